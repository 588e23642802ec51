-- What a walk through one bucket of a cluster will meet. ARGV[9]: "expired" or "live" if only such are meant.
-- Returns how many names are to be looked at by the criteria, and how many sessions have left here and may not
-- have arrived (depart.lua).
local count
if ARGV[9] == 'expired' then
    count = redis.call('ZCOUNT', P .. 'x', '-inf', digits(now))
elseif by_token then
    count = head(token) and 1 or 0
else
    local low = after
    if ARGV[9] == 'live' then
        low = after and after > now and after or now
    end
    count = redis.call('ZCOUNT', source, low and '(' .. digits(low) or '-inf',
        before and '(' .. digits(before) or '+inf')
end
return { count, redis.call('HLEN', P .. 'l') }
