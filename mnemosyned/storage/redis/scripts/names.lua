-- Returns the names in the index of a subject or refresh token, unless they are more than ARGV[9].
if source == P .. 'x' or redis.call('ZCARD', source) > tonumber(ARGV[9]) then
    return false
end
return redis.call('ZRANGEBYSCORE', source, '-inf', '+inf')
