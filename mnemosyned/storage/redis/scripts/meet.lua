-- Takes note of the primaries of a cluster (cluster/admission.py). ARGV: a random text, and what names each of them.
-- One that is new here makes another store: that is what the other nodes see when they renew their leases.
-- Returns how long ago the last one was new, in microseconds, and how many nodes have rows.
local known, MOST = P .. 'primaries', 200
for at = 2, #ARGV do
    if redis.call('HEXISTS', known, ARGV[at]) == 0 then
        if redis.call('HLEN', known) >= MOST then
            redis.call('DEL', known)
        end
        redis.call('HSET', known, ARGV[at], '')
        redis.call('HSET', known, 'since', digits(now))
        redis.call('SET', P .. 'epoch', ARGV[1])
    end
end
return { now - (tonumber(redis.call('HGET', known, 'since')) or now), redis.call('HLEN', P .. 'nodes') }
