-- Returns live sessions by expiry, then by name. ARGV[9]: offset, limit, most bytes of the page, and of a bag.
-- Returns 1 if the page is cut for its size, else 0; then names and records.
local offset, limit = tonumber(ARGV[9]), tonumber(ARGV[10])
local max_page, max_bag = tonumber(ARGV[11]), tonumber(ARGV[12])
local CHUNK, MOST = 200, 20000
local low = after and after > now and after or now
-- The index knows the place of an offset, unless its names are looked at one by one.
local skip, at = 0, offset
if by_token or is_filtered then
    skip, at = offset, 0
end
local out, size, looked = { 0 }, 0, 0
while #out < 2 * limit and looked < MOST do
    local names, gone = candidates(low, at, CHUNK), 0
    for _, name in ipairs(names) do
        local expiry, its_subject, its_refresh = head(name)
        if not expiry then
            gone = gone + forget(name)
        elseif expiry > now and meets(expiry, its_subject, its_refresh) then
            if skip > 0 then
                skip = skip - 1
            else
                local raw = shown(read('GET', P .. 's:' .. name), max_bag)
                size = size + (type(raw) == 'string' and #raw or 0)
                if size > max_page and #out > 1 then
                    out[1] = 1
                    return out
                end
                out[#out + 1] = name
                out[#out + 1] = raw
                if #out > 2 * limit then
                    return out
                end
            end
        end
    end
    at, looked = at + #names - gone, looked + #names
    if #names < CHUNK then
        return out
    end
end
return out
