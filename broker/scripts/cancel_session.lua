-- A closed socket: cancels what its session has waiting, then what it has running.
go_on_without_memory()
local session = load_session(ARGV[1])
for _, request_id in ipairs({session.waiting, session.running}) do
  local job = request_id ~= '' and load_job(request_id)
  if job then cancel_request(job) end
end
return 1
