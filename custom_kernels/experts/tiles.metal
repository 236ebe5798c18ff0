// Cuts token-expert assignments (`pairs`) into tiles of ROWS, each of one slot, slots ascending.
// slots[p] is the slot of assignment p, counts[s] the assignments of slot s. places[p] is p's row in
// the tiles, rows[places[p]] is p; unused rows are 0. Unused tiles repeat the last slot.
// Grid: x = 256 * SLOTS. Threadgroup: 256, for one slot; each lane reads a run of assignments.
// The numbers of assignments and tiles change from call to call, so they are not constants.
threadgroup uint found[256];
uint pairs = slots_shape[0];
uint most_tiles = (pairs + metal::min(pairs, uint(SLOTS)) * (ROWS - 1)) / ROWS;
uint lane = thread_index_in_threadgroup;
uint slot = threadgroup_position_in_grid.x;
uint tiles_before = 0;
uint tiles_in_all = 0;
for (uint s = 0; s < SLOTS; s++) {
  uint tiles = (counts[s] + ROWS - 1) / ROWS;
  tiles_before += s < slot ? tiles : 0u;
  tiles_in_all += tiles;
}
uint run = (pairs + 255) / 256;
uint begin = lane * run;
uint end = metal::min(begin + run, pairs);
uint mine = 0;
for (uint p = begin; p < end; p++) {
  mine += slots[p] == slot ? 1u : 0u;
}
found[lane] = mine;
threadgroup_barrier(mem_flags::mem_threadgroup);
uint place = tiles_before * ROWS;
for (uint l = 0; l < lane; l++) {
  place += found[l];
}
for (uint p = begin; p < end; p++) {
  if (slots[p] == slot) {
    places[p] = place;
    rows[place] = p;
    place += 1;
  }
}
uint count = counts[slot];
uint tiles = (count + ROWS - 1) / ROWS;
for (uint r = count + lane; r < tiles * ROWS; r += 256) {
  rows[tiles_before * ROWS + r] = 0;
}
for (uint t = lane; t < tiles; t += 256) {
  tile_slots[tiles_before + t] = slot;
}
if (slot == SLOTS - 1) {
  for (uint t = tiles_in_all + lane; t < most_tiles; t += 256) {
    tile_slots[t] = slot;
  }
  for (uint r = tiles_in_all * ROWS + lane; r < most_tiles * ROWS; r += 256) {
    rows[r] = 0;
  }
}
