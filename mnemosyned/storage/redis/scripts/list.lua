-- Returns live sessions by the bytes of their names. ARGV[9]: limit, most bytes of the page, and of a bag, how many
-- names to look at, and where to begin, as ZRANGEBYLEX has it; or that is empty, and the names follow, sorted.
-- Returns 1 if the page is cut for its size, else 0; the name that follows, and the one before it, empty at the
-- end; then names and records.
local limit, max_page, max_bag = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
local most, from = tonumber(ARGV[12]), ARGV[13]
local names = {}
if from ~= '' then
    names = redis.call('ZRANGEBYLEX', P .. 'n', from, '+', 'LIMIT', 0, most + 1)
end
for at = 14, #ARGV do
    names[#names + 1] = ARGV[at]
end
local out, size = { 0, '', '' }, 0
for place, name in ipairs(names) do
    local expiry, its_subject, its_refresh = head(name)
    local wanted = expiry and expiry > now and meets(expiry, its_subject, its_refresh)
    local full = place > most or wanted and #out - 3 >= 2 * limit
    if wanted and not full then
        local raw = shown(read('GET', P .. 's:' .. name), max_bag)
        size = size + (type(raw) == 'string' and #raw or 0)
        if size > max_page and #out > 3 then
            out[1], full = 1, true
        else
            out[#out + 1] = name
            out[#out + 1] = raw
        end
    end
    if full then
        out[2], out[3] = name, names[place - 1]
        return out
    end
end
return out
