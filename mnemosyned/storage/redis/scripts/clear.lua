-- Removes the keys that a trial has made. ARGV: their names.
for at = 1, #ARGV do
    redis.call('DEL', P .. ARGV[at])
end
return 0
