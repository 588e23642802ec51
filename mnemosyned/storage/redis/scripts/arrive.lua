-- Ends the move of sessions (cluster/moves.py). ARGV: of each, the new name, the limit in time, what the move is
-- known by, the record. That it has arrived is kept as a:MOVE:NAME, as long as it may be told to arrive again.
-- Returns 1 or 0 of each: whether there is a live session by the new name; -1: too late.
local out = {}
for at = 1, #ARGV, 4 do
    local name, limit, raw = ARGV[at], tonumber(ARGV[at + 1]), ARGV[at + 3]
    local mark = P .. 'a:' .. ARGV[at + 2] .. ':' .. name
    local expiry, subject, refresh = parse(raw)
    if now >= limit then
        out[#out + 1] = -1
    else
        if expiry > now and redis.call('SET', mark, '', 'NX', 'PXAT', lasts_ms(expiry)) and not is_live(name) then
            local former, its_subject, its_refresh = head(name)
            if former then
                unindex(name, its_subject, its_refresh)
            end
            redis.call('SET', P .. 's:' .. name, raw, 'PXAT', lasts_ms(expiry))
            redis.call('ZADD', P .. 'n', 0, name)
            index(name, expiry, subject, refresh)
        end
        out[#out + 1] = is_live(name) and 1 or 0
    end
end
return out
