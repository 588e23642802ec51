-- Reads sessions for changes of their bags. ARGV: claim, how long it holds in ms, most bytes of a bag,
-- names. Returns of each the clock and the record, nil where there is no live session.
-- With a claim (w:NAME), nobody else may write these bags for a moment.
local claim, max_bag = ARGV[1], tonumber(ARGV[3])
local out = {}
for at = 4, #ARGV do
    local name = ARGV[at]
    local raw = read('GET', P .. 's:' .. name)
    if type(raw) == 'string' and parse(raw) <= now then
        raw = false
    end
    if raw and claim ~= '' then
        redis.call('SET', P .. 'w:' .. name, claim, 'NX', 'PX', ARGV[2])
    end
    out[#out + 1] = raw and { now, shown(raw, max_bag) }
end
return out
