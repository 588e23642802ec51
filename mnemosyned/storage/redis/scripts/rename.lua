-- Gives live sessions new names. ARGV: of each, the old and the new one.
-- Returns 1 or 0 of each: whether there is one by either.
local out = {}
for at = 1, #ARGV, 2 do
    local old, new = ARGV[at], ARGV[at + 1]
    local expiry, subject, refresh = head(old)
    if expiry and expiry > now and old ~= new then
        if is_live(new) then
            remove(old, subject, refresh)
        else
            local former, its_subject, its_refresh = head(new)
            if former then
                unindex(new, its_subject, its_refresh)
            end
            local score = redis.call('ZSCORE', P .. 'x', old) or digits(now)
            redis.call('RENAME', P .. 's:' .. old, P .. 's:' .. new)
            unindex(old, subject, refresh)
            redis.call('ZADD', P .. 'n', 0, new)
            if expiry == math.huge then
                redis.call('ZADD', P .. 'x', score, new)
            else
                index(new, expiry, subject, refresh)
            end
        end
    end
    out[#out + 1] = is_live(new) and 1 or 0
end
return out
