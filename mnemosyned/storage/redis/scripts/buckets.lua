-- The number of buckets, which the first node decides. ARGV: how many that would be.
redis.call('SET', P .. 'buckets', ARGV[1], 'NX')
return redis.call('GET', P .. 'buckets')
