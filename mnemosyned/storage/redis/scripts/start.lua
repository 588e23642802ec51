-- Stores sessions. ARGV: of each, name, life, limit in time, record without its expiry.
-- Returns of each its expiry, -1: too late, -2: the name is in use.
local out = {}
for at = 1, #ARGV, 4 do
    local name, life, limit = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
    local old, old_subject, old_refresh = head(name)
    if now >= limit then
        out[#out + 1] = -1
    elseif old and old > now then
        out[#out + 1] = -2
    else
        if old then
            unindex(name, old_subject, old_refresh)
        end
        local expiry = now + life
        local raw = digits(expiry) .. ARGV[at + 3]
        local _, subject, refresh = parse(raw)
        redis.call('SET', P .. 's:' .. name, raw, 'PXAT', lasts_ms(expiry))
        redis.call('ZADD', P .. 'n', 0, name)
        index(name, expiry, subject, refresh)
        out[#out + 1] = expiry
    end
end
return out
