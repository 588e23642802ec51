-- The criteria of List and Delete, in ARGV[1] to ARGV[8]: what is not given is empty.
local by_token, by_subject, by_refresh = ARGV[1] ~= '', ARGV[3] ~= '', ARGV[5] ~= ''
local token, subject, refresh = ARGV[2], ARGV[4], ARGV[6]
local after, before = tonumber(ARGV[7]), tonumber(ARGV[8])
local is_filtered = by_subject and by_refresh

-- The index in which the fewest names are to be looked at.
local source = P .. 'x'
if by_subject and (not is_filtered
    or redis.call('ZCARD', P .. 'u:' .. subject) < redis.call('ZCARD', P .. 'r:' .. refresh)) then
    source = P .. 'u:' .. subject
elseif by_refresh and refresh ~= '' then
    source = P .. 'r:' .. refresh
end

local function meets(expiry, its_subject, its_refresh)
    return (not by_subject or its_subject == subject)
        and (not by_refresh or its_refresh == refresh)
        and (not after or expiry > after)
        and (not before or expiry < before)
end

local function candidates(low, offset, count)
    if by_token then
        return offset == 0 and { token } or {}
    end
    return redis.call('ZRANGEBYSCORE', source, low and '(' .. digits(low) or '-inf',
        before and '(' .. digits(before) or '+inf', 'LIMIT', offset, count)
end

-- Removes a name without its session; returns 1 if it was in the index that is looked through.
local function forget(name)
    local found = redis.call('ZREM', source, name)
    unindex(name, '', '')
    return found
end
