-- Goes through all sessions by the bytes of their names. ARGV: where to begin, as ZRANGEBYLEX has it, limit,
-- most bytes of the page, and of a bag; the last two empty for names alone. Returns names, or names and records.
local from, limit = ARGV[1], tonumber(ARGV[2])
local max_page, max_bag = tonumber(ARGV[3]), tonumber(ARGV[4])
local out, size, found = {}, 0, 0
while found < limit and (not max_page or size < max_page) do
    local names = redis.call('ZRANGEBYLEX', P .. 'n', from, '+', 'LIMIT', 0, limit - found)
    for _, name in ipairs(names) do
        from = '(' .. name
        if redis.call('EXISTS', P .. 's:' .. name) == 0 then
            redis.call('ZREM', P .. 'n', name)
        else
            found = found + 1
            out[#out + 1] = name
            if max_page then
                local raw = shown(read('GET', P .. 's:' .. name), max_bag)
                size = size + (type(raw) == 'string' and #raw or 0)
                out[#out + 1] = raw
                if size >= max_page then
                    return out
                end
            end
        end
    end
    if #names == 0 then
        return out
    end
end
return out
