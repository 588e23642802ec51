-- Tells of each name in ARGV where its session is: 1: there; else a text, another one after each departure from the
-- name, which begins with "l" if the session has left and may not have arrived.
local out = {}
for at = 1, #ARGV do
    if is_live(ARGV[at]) then
        out[at] = 1
    else
        local left = redis.call('HEXISTS', P .. 'l', ARGV[at]) == 1 and 'l' or '-'
        out[at] = left .. (redis.call('GET', P .. 'd:' .. ARGV[at]) or '')
    end
end
return out
