-- Lines: per lane, model and owner a list of places. A place is 'r:' and a request, or 's:' and a session.
-- The ring of a lane holds each owner with a non-empty line once. Its score is the owner's virtual time: the cost of
-- all that it was served so far, divided by its weight. The least goes next (start-time fair queueing: Goyal, Vin and
-- Cheng, SIGCOMM 1996, section 2), so owners share what the workers can do, not the number of requests.

local MIN_READY_DEPTH = 4      -- least number of undelivered entries that top_up aims at
local API_SHARE = 5              -- every 5th slot belongs to the API lane, however busy the live lane is
local TURNS_TTL_MS = 3600000

local function weight_of(owner)
  return tonumber(redis.call('HGET', weights_key(), owner) or '1')
end

local function set_weight(owner, weight)
  if weight == weight_of(owner) then return end
  redis.call('HSET', weights_key(), owner, weight)
end

local function cost_of(place)
  local kind, name = string.sub(place, 1, 2), string.sub(place, 3)
  if kind == 's:' then name = redis.call('HGET', session_key(name), 'waiting') or '' end
  return math.max(1, tonumber(redis.call('HGET', job_key(name), 'cost_us') or '1'))
end

-- Who was away comes back at the lane's clock (the virtual time of the last one served): nobody saves up turns. But it
-- isn't ahead of what it was served before, or an owner with one request at a time would always be first.
local function virtual_time(lane, model, owner)
  local score = redis.call('ZSCORE', ring_key(lane, model), owner)
  if score then return tonumber(score) end
  local times = redis.call('HMGET', times_key(lane, model), '', owner)
  return math.max(tonumber(times[1] or '0'), tonumber(times[2] or '0'))
end

-- What was taken from the line and comes back undone costs nothing.
local function refund(model, lane, owner, cost)
  local times, paid = times_key(lane, model), cost / weight_of(owner)
  if redis.call('HEXISTS', times, owner) == 0 then return end
  redis.call('HINCRBYFLOAT', times, owner, -paid)
  if redis.call('ZSCORE', ring_key(lane, model), owner) then redis.call('ZINCRBY', ring_key(lane, model), -paid, owner) end
end

local function push_place(model, lane, owner, place, to_front)
  local push = to_front and 'LPUSH' or 'RPUSH'
  if redis.call(push, line_key(lane, model, owner), place) == 1 then
    redis.call('ZADD', ring_key(lane, model), virtual_time(lane, model, owner), owner)
  end
end

local function leave_ring(model, lane, owner)
  redis.call('ZREM', ring_key(lane, model), owner)
  if redis.call('EXISTS', ring_key(lane, model)) == 0 then redis.call('DEL', times_key(lane, model)) end
end

local function remove_place(model, lane, owner, place)
  local line = line_key(lane, model, owner)
  redis.call('LREM', line, 1, place)
  if redis.call('EXISTS', line) == 0 then leave_ring(model, lane, owner) end
end

-- Takes the next place of a lane, and charges its owner.
local function pop_place(model, lane)
  local ring, times = ring_key(lane, model), times_key(lane, model)
  local owner, now = unpack(redis.call('ZRANGE', ring, 0, 0, 'WITHSCORES'))
  if not owner then return nil end
  local line = line_key(lane, model, owner)
  local place = redis.call('LPOP', line)
  local after = tonumber(now) + cost_of(place) / weight_of(owner)
  redis.call('HSET', times, '', now, owner, after)
  redis.call('PEXPIRE', times, TURNS_TTL_MS)
  if redis.call('EXISTS', line) == 1 then
    redis.call('ZADD', ring, after, owner)
  else
    leave_ring(model, lane, owner)
  end
  return place
end

local function pop_next_place(model)
  local slot = tonumber(redis.call('GET', turns_key(model)) or '0') + 1
  local first, second = 'live', 'api'
  if slot % API_SHARE == 0 then first, second = 'api', 'live' end
  local place = pop_place(model, first) or pop_place(model, second)
  if place then redis.call('SET', turns_key(model), slot % API_SHARE, 'PX', TURNS_TTL_MS) end
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

-- Keeps the ready stream one batch deep. Everything else waits in the lines, where order can still change.
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


-- How many of other owners' places go before the one at `index` of an owner's line, if all cost as much as this one.
local function count_others_before(model, lane, owner, index, cost)
  local num_before = 0
  local own_time = virtual_time(lane, model, owner) + index * cost / weight_of(owner)
  local ring = redis.call('ZRANGE', ring_key(lane, model), 0, -1, 'WITHSCORES')
  for i = 1, #ring, 2 do
    local other = ring[i]
    local turns = (own_time - tonumber(ring[i + 1])) * weight_of(other) / cost
    local num_turns = other < owner and math.floor(turns) + 1 or math.ceil(turns)
    if other ~= owner and num_turns > 0 then
      num_before = num_before + math.min(redis.call('LLEN', line_key(lane, model, other)), num_turns)
    end
  end
  return num_before
end

local function count_live_waiting(model)
  local num_waiting = 0
  for _, owner in ipairs(redis.call('ZRANGE', ring_key('live', model), 0, -1)) do
    num_waiting = num_waiting + redis.call('LLEN', line_key('live', model, owner))
  end
  return num_waiting
end

-- How many go before the place at `index` of an owner's line: its own, other owners', live ones, and the ready stream.
local function count_before(model, lane, owner, index, cost)
  local num_before = index + count_others_before(model, lane, owner, index, math.max(1, cost))
  if lane == 'api' then
    num_before = num_before + math.min(count_live_waiting(model), (API_SHARE - 1) * (num_before + 1))
  end
  return num_before + count_undelivered(model)
end


-- How fast the workers really are, beside what their cost tables say: 0.5 is half as fast. The tables were measured
-- while the worker had its machine to itself. Two sums that fade with time: the work that was finished, and the time it
-- took, both only while there was more to do than the workers could run at once.
local PACE_MEMORY_US = 10000000
local PACE_PRIOR_US = 1000000     -- the tables count as so much experience
local PACE_TTL_MS = 60000

local function get_pace(model)
  local sums = redis.call('HMGET', pace_key(model), 'work_us', 'time_us', 'busy_since_us')
  return {work_us = tonumber(sums[1] or PACE_PRIOR_US), time_us = tonumber(sums[2] or PACE_PRIOR_US),
          busy_since_us = tonumber(sums[3] or '0')}
end

local function set_pace(model, pace)
  redis.call('HSET', pace_key(model), 'work_us', pace.work_us, 'time_us', pace.time_us,
             'busy_since_us', string.format('%.0f', pace.busy_since_us))
  redis.call('PEXPIRE', pace_key(model), PACE_TTL_MS)
end

-- Something has to wait, since the workers run as much as they can.
local function note_busy(model, num_slots)
  local pace = get_pace(model)
  if pace.busy_since_us > 0 or num_slots == 0 or get_depth(model).running < num_slots then return end
  pace.busy_since_us = NOW_US
  set_pace(model, pace)
end

-- `share` is how much of the request's work was done.
local function note_finished(job, share)
  local pace = get_pace(job.model)
  if pace.busy_since_us == 0 then return end
  local elapsed_us = NOW_US - pace.busy_since_us
  local fading = math.exp(-elapsed_us / PACE_MEMORY_US)
  pace.work_us = pace.work_us * fading + share * job.cost_us
  pace.time_us = pace.time_us * fading + elapsed_us
  pace.busy_since_us = NOW_US
  set_pace(job.model, pace)
end

local function speed_of(model)
  local pace = get_pace(model)
  return math.max(0.05, math.min(2, pace.work_us / math.max(1, pace.time_us)))
end

-- When a request with so many before it starts, in ms from now. Requests that find a free slot join the running batch
-- at its next step; the others wait for as much work as stands before them, at what the queue costs on average.
local function predict_start_ms(model, position, cost_us, num_slots)
  local depth = get_depth(model)
  local mean_us = depth.queued > 0 and depth.queued_us / depth.queued or cost_us
  local num_free = math.max(0, num_slots - depth.running)
  return math.max(0, position + 1 - num_free) * mean_us / 1000 / speed_of(model)
end
