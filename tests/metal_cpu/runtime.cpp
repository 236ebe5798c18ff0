// Runs a launch: threadgroup by threadgroup, every lane a fiber, in a chosen order.
#include "runtime.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>

Shared shared;
Lane* current;
const Launch* launch;
u32 group_number, group_epoch[2], simd_epoch[MAX_LANES / BENCH_SIMD][2];

static Report* report;
static sigjmp_buf way_out;
static pthread_t bench_thread;
static void* scheduler_stack;
static unsigned char* stacks;
static u32 lane_count, lane_order[BENCH_SIMD], simd_order[MAX_LANES / BENCH_SIMD];

// Save the callee-saved registers and the stack pointer in *save, continue on the stack `load`.
extern "C" void bench_switch(void** save, void* load);
asm(R"(
.text
.globl bench_switch
.type bench_switch, @function
bench_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

void fail(const char* kind, u64 pc, u32 line, const char* format, ...) {
  snprintf(report->kind, sizeof report->kind, "%s", kind);
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(report->text, sizeof report->text, format, arguments);
  va_end(arguments);
  if (current && length >= 0 && length < int(sizeof report->text)) {
    const BenchLane& lane = current->info;
    snprintf(report->text + length, sizeof report->text - length,
             "; lane (%u, %u, %u) of threadgroup (%u, %u, %u)", lane.position_in_group[0],
             lane.position_in_group[1], lane.position_in_group[2], lane.group_position[0],
             lane.group_position[1], lane.group_position[2]);
  }
  report->failed = 1;
  report->pc = pc;
  report->line = line;
  siglongjmp(way_out, 1);
}

// ---- lanes -------------------------------------------------------------------------------------

unsigned char* stack_of(const Lane* lane) {
  return stacks + u64(lane - shared.lanes) * (STACK + PAGE) + PAGE;
}

static void lane_main() {
  launch->entry(shared.buffers, &current->info);
  current->state = DONE;
  bench_switch(&current->stack_pointer, scheduler_stack);
  __builtin_trap();
}

static void start_lane(Lane* lane) {
  void** top = (void**)(stack_of(lane) + STACK);
  *--top = nullptr;  // so that the stack is aligned as after a call
  *--top = (void*)lane_main;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  lane->stack_pointer = top;
  lane->state = READY;
}

static bool make_stacks() {
  if (stacks) return true;
  void* memory = mmap(nullptr, u64(MAX_LANES) * (STACK + PAGE), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return false;
  stacks = (unsigned char*)memory;
  for (int i = 0; i < MAX_LANES; i++) mprotect(stacks + u64(i) * (STACK + PAGE), PAGE, PROT_NONE);
  return true;
}

const BenchLane* bench_lane() { return &current->info; }

const BenchMeeting* bench_meet(BenchKind kind, const char* what, unsigned line, unsigned flags,
                               const void* value, unsigned size) {
  Lane* lane = current;
  BenchMeeting* meeting = &shared.meetings[lane->info.simdgroup][lane->meetings++ % 2];
  if (size) memcpy(meeting->value[lane->info.index_in_simdgroup], value, size);
  lane->state = WAITING;
  lane->kind = kind;
  lane->what = what;
  lane->line = line;
  lane->flags = flags;
  bench_switch(&lane->stack_pointer, scheduler_stack);
  return meeting;
}

void bench_undefined(const char* what, unsigned line) {
  fail("undefined", 0, line, "%s reads from a lane that does not take part", what);
}

// ---- meeting points ----------------------------------------------------------------------------

static bool same_place(const Lane& a, const Lane& b) {
  if (a.state != b.state) return false;
  return a.state == DONE || (a.kind == b.kind && a.line == b.line && a.what == b.what);
}

[[noreturn]] static void divergent(u32 first, u32 last) {
  char text[700];
  u64 used = 0;
  u32 line = 0;
  for (u32 i = first; i < last && used + 100 < sizeof text;) {
    u32 end = i + 1;
    const Lane& lane = shared.lanes[i];
    while (end < last && same_place(lane, shared.lanes[end])) end++;
    const char* comma = used ? ", " : "";
    used += snprintf(text + used, sizeof text - used, "%slanes %u-%u ", comma, i, end - 1);
    if (lane.state == DONE) {
      used += snprintf(text + used, sizeof text - used, "finished");
    } else {
      used += snprintf(text + used, sizeof text - used, "in %s at line %u", lane.what, lane.line);
      line = line ? line : lane.line;
    }
    i = end;
  }
  fail("divergence", 0, line, "%s", text);
}

static bool together(u32 first, u32 last) {
  for (u32 i = first; i < last; i++)
    if (!same_place(shared.lanes[first], shared.lanes[i])) return false;
  return true;
}

static void pass_barrier(u32 epoch[2], u32 flags) {
  for (int kind = 0; kind < 2; kind++)
    if (flags >> kind & 1) epoch[kind]++;
}

static void release(u32 first, u32 last) {
  for (u32 i = first; i < last; i++) shared.lanes[i].state = READY;
}

// Run one simdgroup until its lanes finish or all wait at a threadgroup barrier.
static void run_simdgroup(u32 simdgroup) {
  u32 first = simdgroup * BENCH_SIMD;
  u32 last = first + BENCH_SIMD < lane_count ? first + BENCH_SIMD : lane_count;
  u32 active = last - first == BENCH_SIMD ? ~0u : (1u << (last - first)) - 1;
  for (;;) {
    for (u32 k = 0; k < BENCH_SIMD; k++) {
      Lane* lane = &shared.lanes[first + lane_order[k]];
      if (first + lane_order[k] >= last || lane->state != READY) continue;
      current = lane;
      bench_switch(&scheduler_stack, lane->stack_pointer);
      current = nullptr;
    }
    const Lane& lane = shared.lanes[first];
    if (!together(first, last)) divergent(first, last);
    if (lane.state == DONE || lane.kind == BENCH_GROUP_BARRIER) return;
    if (lane.kind == BENCH_SIMD_BARRIER) pass_barrier(simd_epoch[simdgroup], lane.flags);
    shared.meetings[simdgroup][(lane.meetings - 1) % 2].active = active;
    release(first, last);
  }
}

static void run_group() {
  u32 simdgroups = (lane_count + BENCH_SIMD - 1) / BENCH_SIMD;
  for (u32 i = 0; i < lane_count; i++) start_lane(&shared.lanes[i]);
  memset(group_epoch, 0, sizeof group_epoch);
  for (;;) {
    memset(simd_epoch, 0, sizeof simd_epoch);
    for (u32 k = 0; k < MAX_LANES / BENCH_SIMD; k++)
      if (simd_order[k] < simdgroups) run_simdgroup(simd_order[k]);
    if (!together(0, lane_count)) divergent(0, lane_count);
    if (shared.lanes[0].state == DONE) return;
    pass_barrier(group_epoch, shared.lanes[0].flags);
    release(0, lane_count);
  }
}

// ---- threadgroups ------------------------------------------------------------------------------

static u32 random_state, *group_order, group_count;

static void permute(u32* order, u32 count) {
  for (u32 i = 0; i < count; i++) order[i] = launch->order == 1 ? count - 1 - i : i;
  if (launch->order != 2) return;
  for (u32 i = count - 1; i > 0; i--) {
    random_state = random_state * 1664525u + 1013904223u;
    u32 other = (random_state >> 8) % (i + 1), kept = order[i];
    order[i] = order[other];
    order[other] = kept;
  }
}

// Give the lanes of one threadgroup their coordinates; the last ones of a grid may be smaller.
static void place_lanes(const u32 position[3], const u32 groups[3]) {
  u32 size[3];
  for (int d = 0; d < 3; d++) {
    u32 left = launch->grid[d] - position[d] * launch->group[d];
    size[d] = left < launch->group[d] ? left : launch->group[d];
  }
  lane_count = size[0] * size[1] * size[2];
  for (u32 i = 0; i < lane_count; i++) {
    BenchLane& lane = shared.lanes[i].info;
    const u32 place[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
    for (int d = 0; d < 3; d++) {
      lane.position_in_group[d] = place[d];
      lane.group_position[d] = position[d];
      lane.position_in_grid[d] = position[d] * launch->group[d] + place[d];
      lane.groups_per_grid[d] = groups[d];
      lane.threads_per_grid[d] = launch->grid[d];
      lane.threads_per_group[d] = size[d];
      lane.dispatch_per_group[d] = launch->group[d];
    }
    lane.index_in_group = i;
    lane.index_in_simdgroup = i % BENCH_SIMD;
    lane.simdgroup = i / BENCH_SIMD;
    lane.simdgroups = (lane_count + BENCH_SIMD - 1) / BENCH_SIMD;
    shared.lanes[i].meetings = 0;
  }
}

static void run_grid() {
  u32 groups[3];
  group_count = 1;
  for (int d = 0; d < 3; d++) {
    groups[d] = (launch->grid[d] + launch->group[d] - 1) / launch->group[d];
    group_count *= groups[d];
  }
  group_order = (u32*)bench_map(u64(group_count) * sizeof(u32), 0);
  if (!group_order) fail("bench", 0, 0, "no memory for the order of %u threadgroups", group_count);
  random_state = launch->seed;
  permute(group_order, group_count);
  for (u32 i = 0; i < group_count; i++) {
    const u32 index = group_order[i];
    const u32 position[3] = {index % groups[0], index / groups[0] % groups[1],
                             index / groups[0] / groups[1]};
    permute(lane_order, BENCH_SIMD);
    permute(simd_order, MAX_LANES / BENCH_SIMD);
    place_lanes(position, groups);
    group_number = i;
    for (u32 r = 0; r < region_count; r++)
      if (regions[r].group_memory) memset(regions[r].address, int(launch->fill), regions[r].size);
    run_group();
  }
  if (launch->checked) check_all_written();
}

// ---- signals -----------------------------------------------------------------------------------

static const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE, SIGALRM};
enum { SIGNAL_COUNT = sizeof SIGNALS / sizeof *SIGNALS };
static struct sigaction before[SIGNAL_COUNT];

static void on_signal(int number, siginfo_t* info, void* context) {
  if (!pthread_equal(pthread_self(), bench_thread)) {
    if (number == SIGALRM) pthread_kill(bench_thread, SIGALRM);
    else signal(number, SIG_DFL);  // not ours: let it recur and end the process
    return;
  }
  u64 pc = u64(((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP]);
  char text[300];
  if (number == SIGALRM) fail("timeout", pc, 0, "still running after %u s", launch->timeout);
  if (number == SIGILL || number == SIGTRAP)
    fail("undefined", pc, 0, "outside a lane's own array, or an endless loop without effect");
  if (number == SIGFPE) fail("undefined", pc, 0, "integer division by zero");
  // The CPU gives no address for a misaligned vector access.
  if (!info->si_addr) fail("undefined", pc, 0, "misaligned vector access, or a null pointer");
  describe(text, sizeof text, (const unsigned char*)info->si_addr);
  fail("out of bounds", pc, 0, "access to %p, %s", info->si_addr, text);
}

static void watch(bool on) {
  static unsigned char signal_stack[64 * 1024];
  static stack_t stack_before;
  static struct itimerval timer_before;
  struct itimerval timer = {};
  if (on) {
    stack_t stack = {.ss_sp = signal_stack, .ss_flags = 0, .ss_size = sizeof signal_stack};
    sigaltstack(&stack, &stack_before);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < SIGNAL_COUNT; i++) sigaction(SIGNALS[i], &action, &before[i]);
    timer.it_value.tv_sec = launch->timeout;
    setitimer(ITIMER_REAL, &timer, &timer_before);
    return;
  }
  setitimer(ITIMER_REAL, &timer_before, nullptr);
  for (int i = 0; i < SIGNAL_COUNT; i++) sigaction(SIGNALS[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
}

int bench_run(const Launch* wanted, Report* result) {
  launch = wanted;
  report = result;
  current = nullptr;
  bench_thread = pthread_self();
  memset(result, 0, sizeof *result);
  bool ready = make_stacks();
  watch(true);
  if (sigsetjmp(way_out, 1) == 0) {
    if (!ready) fail("bench", 0, 0, "no memory for the lanes' stacks");
    for (u32 i = 0; i < launch->buffer_count; i++) {
      if (i == MAX_REGIONS) fail("bench", 0, 0, "more than %d arrays", MAX_REGIONS);
      shared.buffers[i] = launch->buffers[i].address;
      add_region(launch->buffers[i], false, 0);
    }
    run_grid();
  }
  watch(false);
  current = nullptr;
  drop_regions();
  if (group_order) bench_unmap(group_order, u64(group_count) * sizeof(u32));
  group_order = nullptr;
  return int(result->failed);
}
