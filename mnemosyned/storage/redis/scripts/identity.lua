-- Names the server with what it holds: a restart, a promotion and another data set each change it.
local function store_identity()
    local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
    local data = string.match(redis.call('INFO', 'replication'), 'master_replid:(%w+)')
    return run .. '/' .. data .. '/' .. (redis.call('GET', P .. 'epoch') or '')
end
