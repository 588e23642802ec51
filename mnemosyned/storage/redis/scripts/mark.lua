-- Writes, so that a WAIT behind it waits for all that was written before it, by whichever connection.
redis.call('SET', P .. 'mark', digits(now), 'PX', 60000)
return 1
