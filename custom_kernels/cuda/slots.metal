// Assigns a slot to each requested expert. Missing experts get the free slots, then evict those with
// the fewest decayed uses among those not requested now.
// slot_of[e] is the slot of expert e or NONE; demand[e] is log2 of its uses, which decay with a
// half-life of HALF_LIFE uses; counts are experts requested and missing so far. tasks[q] is expert
// and slot of the q-th missing expert, then NONE. `earlier` is unread: it only orders the launches.
// Grid: one threadgroup of 256. M ids, of which at most SLOTS differ.
constexpr uint NONE = 0xffffffffu;
constexpr float FREE = -3.0e38f;
constexpr float KEPT = 3.0e38f;
threadgroup uint owner[SLOTS];
threadgroup float worth[SLOTS];
threadgroup uint givers[M];
threadgroup uint repeated[M];
threadgroup uint absent[M];
uint lane = thread_index_in_threadgroup;
for (uint s = lane; s < SLOTS; s += 256) {
  owner[s] = NONE;
}
for (uint i = lane; i < M; i += 256) {
  uint again = 0;
  for (uint j = 0; j < i; j++) {
    again = ids[j] == ids[i] ? 1u : again;
  }
  repeated[i] = again;
  absent[i] = again == 0 && slot_of[ids[i]] == NONE ? 1u : 0u;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint e = lane; e < EXPERTS; e += 256) {
  uint slot = slot_of[e];
  if (slot != NONE) {
    owner[slot] = e;
  }
}
uint distinct = 0;
uint missing = 0;
for (uint i = 0; i < M; i++) {
  distinct += repeated[i] == 0 ? 1u : 0u;
  missing += absent[i];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint s = lane; s < SLOTS; s += 256) {
  uint e = owner[s];
  float value = e == NONE ? FREE : static_cast<float>(demand[metal::min(e, uint(EXPERTS - 1))]);
  for (uint i = 0; i < M; i++) {
    value = ids[i] == e ? KEPT : value;
  }
  worth[s] = value;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (missing > 0) {
  for (uint s = lane; s < SLOTS; s += 256) {
    float mine = worth[s];
    uint rank = 0;
    for (uint t = 0; t < SLOTS; t++) {
      rank += worth[t] < mine || (worth[t] == mine && t < s) ? 1u : 0u;
    }
    if (rank < missing) {
      givers[rank] = s;
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint e = lane; e < EXPERTS; e += 256) {
  uint slot = slot_of[e];
  float score = static_cast<float>(demand[e]) - static_cast<float>(distinct) / float(HALF_LIFE);
  for (uint q = 0; q < missing; q++) {
    slot = slot_of[e] == givers[q] ? NONE : slot;
  }
  uint q = 0;
  for (uint i = 0; i < M; i++) {
    if (ids[i] == e && repeated[i] == 0) {
      score = metal::log(1.0f + metal::exp(score * 0.69314718f)) * 1.44269504f;
      slot = absent[i] ? givers[q] : slot;
    }
    q += absent[i];
  }
  new_slot_of[e] = slot;
  new_demand[e] = score;
}
for (uint i = lane; i < M; i += 256) {
  uint q = 0;
  uint slot = slot_of[ids[i]];
  uint expert_of = NONE;
  uint slot_of_it = NONE;
  for (uint j = 0; j < M; j++) {
    slot = absent[j] && ids[j] == ids[i] ? givers[q] : slot;
    expert_of = absent[j] && q == i ? ids[j] : expert_of;
    slot_of_it = absent[j] && q == i ? givers[q] : slot_of_it;
    q += absent[j];
  }
  slots[i] = slot;
  tasks[2 * i] = expert_of;
  tasks[2 * i + 1] = slot_of_it;
}
if (lane < 4) {
  new_counts[lane] = counts[lane] + (lane == 0 ? distinct : lane == 1 ? missing : 0u);
}
