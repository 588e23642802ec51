-- Removes the row of a node. ARGV: name, instance, and number unless that is empty.
local nodes = P .. 'nodes'
local row = redis.call('HGET', nodes, ARGV[1])
local instance, number = string.match(row or '', '^(%d+) (%d+) ')
if instance == ARGV[2] and (ARGV[3] == '' or number == ARGV[3]) then
    redis.call('HDEL', nodes, ARGV[1])
end
return 0
