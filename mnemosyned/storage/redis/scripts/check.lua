-- Whether calls can be answered. ARGV: the identity of the sessions as the daemon knows it, and a random text.
-- Returns the identity, what changes when the sessions are others, the clock, and the number of sessions.
redis.call('SET', P .. 'identity', ARGV[1], 'NX')
redis.call('SET', P .. 'epoch', ARGV[2], 'NX')
return { redis.call('GET', P .. 'identity'), store_identity(), now, redis.call('ZCARD', P .. 'x') }
