-- Lines: per lane, model and owner a list of places. A place is 'r:' and a request, or 's:' and a session.
-- The ring of a lane holds each owner with a non-empty line once, in the order of their turns.

local MIN_READY_DEPTH = 4      -- least number of undelivered entries that top_up aims at
local API_SHARE = 5              -- every 5th slot belongs to the API lane, however busy the live lane is
local TURNS_TTL_MS = 3600000

local function push_place(model, lane, owner, place, to_front)
  local push = to_front and 'LPUSH' or 'RPUSH'
  if redis.call(push, line_key(lane, model, owner), place) == 1 then
    redis.call(push, ring_key(lane, model), owner)
  end
end

local function remove_place(model, lane, owner, place)
  local line = line_key(lane, model, owner)
  redis.call('LREM', line, 1, place)
  if redis.call('LLEN', line) == 0 then redis.call('LREM', ring_key(lane, model), 1, owner) end
end

local function rotate(ring, lane, model, owner)
  local weight = tonumber(redis.call('HGET', weights_key(), owner) or '1')
  if weight > 1 then
    local turns = turns_key(model)
    local last = redis.call('HGET', turns, 'owner:' .. lane)
    if last ~= owner then redis.call('HSET', turns, 'owner:' .. lane, owner, 'served:' .. lane, 0) end
    if redis.call('HINCRBY', turns, 'served:' .. lane, 1) < weight then return end
    redis.call('HSET', turns, 'served:' .. lane, 0)
  end
  redis.call('LMOVE', ring, ring, 'LEFT', 'RIGHT')
end

-- Takes the next place of a lane: one (or `weight`) of each owner in turn.
local function pop_place(model, lane)
  local ring = ring_key(lane, model)
  local owner = redis.call('LINDEX', ring, 0)
  if not owner then return nil end
  local line = line_key(lane, model, owner)
  local place = redis.call('LPOP', line)
  if redis.call('EXISTS', line) == 0 then
    redis.call('LPOP', ring)
  else
    rotate(ring, lane, model, owner)
  end
  return place
end

local function pop_next_place(model)
  local slot = tonumber(redis.call('HGET', turns_key(model), 'slot') or '0') + 1
  local first, second = 'live', 'api'
  if slot % API_SHARE == 0 then first, second = 'api', 'live' end
  local place = pop_place(model, first) or pop_place(model, second)
  if place then
    redis.call('HSET', turns_key(model), 'slot', slot % API_SHARE)
    redis.call('PEXPIRE', turns_key(model), TURNS_TTL_MS)
  end
  return place
end

-- Created with id 0: what was submitted before the first worker came must not be skipped.
local function ensure_group(model)
  redis.pcall('XGROUP', 'CREATE', ready_key(model), GROUP, '0', 'MKSTREAM')
  redis.call('SADD', models_key(), model)
end

local function count_undelivered(model)
  local pending = redis.pcall('XPENDING', ready_key(model), GROUP)
  if pending.err then
    ensure_group(model)
    pending = {0}
  end
  return redis.call('XLEN', ready_key(model)) - pending[1]
end

-- Keeps the ready stream one to two batches deep. Everything else waits in the lines, where order can still change.
local function top_up(model)
  local target = math.max(MIN_READY_DEPTH, tonumber(redis.call('GET', target_key(model)) or '0'))
  for _ = count_undelivered(model) + 1, target do
    local place = pop_next_place(model)
    if not place then return end
    local entry_id = redis.call('XADD', ready_key(model), '*', 'place', place)
    local kind, name = string.sub(place, 1, 2), string.sub(place, 3)
    if kind == 'r:' then
      redis.call('HSET', job_key(name), 'entry_id', entry_id)
    else
      redis.call('HSET', session_key(name), 'place', 'ready', 'entry_id', entry_id)
    end
  end
end

local function drop_entry(model, entry_id)
  redis.call('XACK', ready_key(model), GROUP, entry_id)
  redis.call('XDEL', ready_key(model), entry_id)
end


-- How many stand before a place. Exact for equal weights and one lane; else a fair estimate.
local function count_before_in_line(model, lane, owner, index)
  local num_before, is_ahead = index, 1
  for _, other in ipairs(redis.call('LRANGE', ring_key(lane, model), 0, -1)) do
    if other == owner then
      is_ahead = 0
    else
      num_before = num_before + math.min(redis.call('LLEN', line_key(lane, model, other)), index + is_ahead)
    end
  end
  return num_before
end

local function count_live_waiting(model)
  local num_waiting = 0
  for _, owner in ipairs(redis.call('LRANGE', ring_key('live', model), 0, -1)) do
    num_waiting = num_waiting + redis.call('LLEN', line_key('live', model, owner))
  end
  return num_waiting
end
