// Gated delta rule over T tokens. Per value head and token, with state S [DV, DK]:
//     S <- g S;  S <- S + beta (v - S k) k^T;  y = S q
// With MASK, a masked token has its y but leaves S unchanged.
// Grid: x = LANES * ceil(DV / BLOCK), y = HV, z = B. Threadgroup: LANES = 32 * SIMDGROUPS.
// ROW_LANES lanes hold ROWS rows of S in registers from the first token to the last; a threadgroup
// computes BLOCK rows. Its lanes read the next TILE tokens while they compute the last TILE ones
// from threadgroup memory; tokens beyond T repeat the last one with g = 1 and beta = 0.
constexpr int LANES = 32 * SIMDGROUPS;
constexpr int BLOCK = LANES / ROW_LANES * ROWS;
constexpr int COLUMNS = (DK + ROW_LANES * VEC - 1) / (ROW_LANES * VEC) * VEC;
constexpr int WIDTH = COLUMNS * ROW_LANES;
constexpr int KEY_READS = (TILE * WIDTH + LANES - 1) / LANES;
constexpr int VALUE_READS = (TILE * BLOCK + LANES - 1) / LANES;
// Two buffers: lanes fill one while they read the other.
threadgroup Run<VEC> queries[2 * TILE * WIDTH / VEC];
threadgroup Run<VEC> keys[2 * TILE * WIDTH / VEC];
threadgroup float values[2 * TILE * BLOCK];
threadgroup float decays[2 * TILE];
threadgroup float strengths[2 * TILE];
threadgroup float keeps[2 * TILE];
uint lane = thread_index_in_threadgroup;
uint part = lane % ROW_LANES;
uint unit = lane / ROW_LANES;
uint top = threadgroup_position_in_grid.x * BLOCK;
uint hv = threadgroup_position_in_grid.y;
uint hk = hv / (HV / HK);
size_t b = threadgroup_position_in_grid.z;
uint tokens = q_shape[1];
uint last = tokens - 1;
uint tiles = (tokens + TILE - 1) / TILE;
auto matrix = state + (b * HV + hv) * (DV * DK);
auto new_matrix = new_state + (b * HV + hv) * (DV * DK);
// The first ROWS lanes of a row write one y each.
bool writes = part < ROWS && top + unit * ROWS + part < DV;
auto out = y + (b * tokens * HV + hv) * DV + top + unit * ROWS + part;

float s[ROWS][COLUMNS];
for (int r = 0; r < ROWS; r++) {
  uint row = metal::min(top + unit * ROWS + r, uint(DV - 1));
  read_row<DK, ROW_LANES, VEC>(matrix + row * DK, part, s[r]);
}
// This token's S k and the last token's S q, summed over lanes together.
float sums[2 * ROWS];
for (int r = 0; r < 2 * ROWS; r++) {
  sums[r] = 0.0f;
}
for (uint tile = 0; tile <= tiles; tile++) {
  // Start reading this tile; its values are first used after the tile before it is done.
  QT next_q[KEY_READS];
  KT next_k[KEY_READS];
  VT next_v[VALUE_READS];
  for (int j = 0; j < KEY_READS; j++) {
    uint i = lane + j * LANES;
    uint column = i % WIDTH;
    size_t t = metal::min(uint(tile * TILE + i / WIDTH), last);
    size_t place = ((b * tokens + t) * HK + hk) * DK + column;
    bool inside = WIDTH == DK || column < DK;
    next_q[j] = inside ? q[place] : static_cast<QT>(0.0f);
    next_k[j] = inside ? k[place] : static_cast<KT>(0.0f);
  }
  for (int j = 0; j < VALUE_READS; j++) {
    uint i = lane + j * LANES;
    uint row = metal::min(top + i % BLOCK, uint(DV - 1));
    size_t t = metal::min(uint(tile * TILE + i / BLOCK), last);
    next_v[j] = v[((b * tokens + t) * HV + hv) * DV + row];
  }
  GT next_g = static_cast<GT>(1.0f);
  BT next_beta = static_cast<BT>(0.0f);
  float next_keep = 1.0f;
  if (lane < TILE && tile * TILE + lane < tokens) {
    size_t place = b * tokens + tile * TILE + lane;
    next_g = g[place * HV + hv];
    next_beta = beta[place * HV + hv];
    next_keep = MASK && !mask[place] ? 0.0f : 1.0f;
  }

  if (tile > 0) {
    uint base = (tile - 1) % 2 * TILE;
    float ks[COLUMNS];
    read_runs<DK, ROW_LANES, VEC>(keys + base * (WIDTH / VEC), part, ks);
    for (int i = 0; i < TILE; i++) {
      uint slot = base + i;
      float factor = decays[slot];
      bool keep = !MASK || keeps[slot] > 0.0f;
      float qs[COLUMNS];
      read_runs<DK, ROW_LANES, VEC>(queries + slot * (WIDTH / VEC), part, qs);
      for (int r = 0; r < ROWS; r++) {
        sums[r] = dot<COLUMNS>(s[r], ks);
      }
      sum_over<2 * ROWS, ROW_LANES>(sums);
      float done = sums[ROWS];
      float fresh[ROWS][COLUMNS];
      for (int r = 0; r < ROWS; r++) {
        done = choose(part == uint(r), sums[ROWS + r], done);
        float change = (values[slot * BLOCK + unit * ROWS + r] - factor * sums[r]) * strengths[slot];
        for (int c = 0; c < COLUMNS; c++) {
          fresh[r][c] = metal::fma(change, ks[c], factor * s[r][c]);
          s[r][c] = choose(keep, fresh[r][c], s[r][c]);
        }
      }
      // Read the next token's k while computing this token's S q.
      uint following = i + 1 < TILE ? slot + 1 : slot;
      read_runs<DK, ROW_LANES, VEC>(keys + following * (WIDTH / VEC), part, ks);
      for (int r = 0; r < ROWS; r++) {
        sums[ROWS + r] = dot<COLUMNS>(fresh[r], qs);
      }
      uint t = (tile - 1) * TILE + i;
      if (writes && t > 0 && t <= tokens) {
        out[size_t(t - 1) * (HV * DV)] = static_cast<QT>(done);
      }
    }
  }

  uint base = tile % 2 * TILE;
  for (int j = 0; j < KEY_READS; j++) {
    uint i = lane + j * LANES;
    if (i < TILE * WIDTH) {
      uint place = base * WIDTH + i;
      queries[place / VEC].v[place % VEC] = static_cast<float>(next_q[j]);
      keys[place / VEC].v[place % VEC] = static_cast<float>(next_k[j]);
    }
  }
  for (int j = 0; j < VALUE_READS; j++) {
    uint i = lane + j * LANES;
    if (i < TILE * BLOCK) {
      values[base * BLOCK + i] = static_cast<float>(next_v[j]);
    }
  }
  if (lane < TILE) {
    decays[base + lane] = static_cast<float>(next_g);
    strengths[base + lane] = static_cast<float>(next_beta);
    keeps[base + lane] = next_keep;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
sum_over<2 * ROWS, ROW_LANES>(sums);
float done = sums[ROWS];
for (int r = 0; r < ROWS; r++) {
  done = choose(part == uint(r), sums[ROWS + r], done);
  uint row = top + unit * ROWS + r;
  if (row < DV) {
    write_row<DK, ROW_LANES, VEC>(new_matrix + row * DK, part, s[r]);
  }
}
if (writes && tiles * TILE == tokens) {
  out[size_t(last) * (HV * DV)] = static_cast<QT>(done);
}
