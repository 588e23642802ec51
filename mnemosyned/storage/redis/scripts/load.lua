-- Reads sessions, and moves expiries that are behind. ARGV: life, the least of it that needs no move, most
-- bytes of a bag, names. Returns the records, nil where there is no live session.
local life, fresh, max_bag = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local out = {}
for at = 4, #ARGV do
    local name = ARGV[at]
    local raw = read('GET', P .. 's:' .. name)
    if type(raw) == 'string' then
        local expiry, subject, refresh = parse(raw)
        if expiry <= now then
            raw = false
        elseif expiry < now + fresh then
            move(name, now + life, subject, refresh)
            raw = digits(now + life) .. string.sub(raw, 17)
        end
    end
    out[#out + 1] = shown(raw, max_bag)
end
return out
