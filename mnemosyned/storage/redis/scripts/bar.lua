-- Raises the epoch of a node's row. ARGV: name.
-- Returns the identity of the store, epoch, instance and number; nothing if there is no row.
local nodes = P .. 'nodes'
local row = redis.call('HGET', nodes, ARGV[1])
if not row then
    return {}
end
local instance, number, epoch, rest = string.match(row, '^(%d+) (%d+) (%d+) (.*)$')
epoch = string.format('%.0f', tonumber(epoch) + 1)
redis.call('HSET', nodes, ARGV[1], instance .. ' ' .. number .. ' ' .. epoch .. ' ' .. rest)
return { store_identity(), epoch, instance, number }
