// ldmatrix and stmatrix. Each lane gives an address and takes or gives words; what it reads or
// writes for the race detector are the bytes of its own words, wherever the other lanes' addresses
// have put them.
#include "../host/matrix.hpp"

#include <cstring>

#include "collective.hpp"
#include "race.hpp"
#include "report.hpp"

namespace llmkernels::emulator {

namespace {

constexpr uint32_t kRowBytes = 16, kElementBytes = 2, kMatrixRows = 8;
constexpr uint32_t kBankBytes = 128;  // of all banks together

struct Transfer {
  const char* name;
  uint32_t row_smem;
  uint32_t* words;  // [matrices]
  uint32_t matrices;
  bool transposed;
  bool stores;
  const void* code;
};

std::string name_of(const Thread& thread) {
  return "lane " + std::to_string(thread.lane) + " of warp " + std::to_string(thread.warp) +
         " of " + block.name();
}

// The address of one of the two elements that a lane has of a matrix.
unsigned char* element(const Collective& warp, uint32_t matrix, unsigned lane, uint32_t half) {
  const auto& own = warp.argument<Transfer>(lane);
  const uint32_t outer = lane / 4, inner = lane % 4 * 2 + half;
  const uint32_t row = own.transposed ? inner : outer, column = own.transposed ? outer : inner;
  const uint32_t row_smem = warp.argument<Transfer>(kMatrixRows * matrix + row).row_smem;
  return shared_memory() + row_smem + column * kElementBytes;
}

// Checks the access of a lane that waits in the collective.
void watch(const Collective& warp, unsigned lane, const void* address, size_t bytes) {
  const auto& own = warp.argument<Transfer>(lane);
  const ThreadIdentity* running = current;
  current = warp.lanes[lane];
  race_access({address, bytes, own.stores, own.name, own.code}, race_thread_agent());
  current = running;
}

// The eight rows of a matrix move in one turn if no two of them, at different addresses, have the
// same 16 bytes of the banks.
void look_for_bank_conflicts(const Collective& warp, uint32_t matrix) {
  for (uint32_t i = 0; i < kMatrixRows; ++i) {
    const auto& row = warp.argument<Transfer>(kMatrixRows * matrix + i);
    for (uint32_t j = 0; j < i; ++j) {
      const auto& other = warp.argument<Transfer>(kMatrixRows * matrix + j);
      if (row.row_smem == other.row_smem || (row.row_smem - other.row_smem) % kBankBytes != 0)
        continue;
      report("bank conflict",
             std::string(row.name) + " in " + block.name() + " has the rows " + std::to_string(j) +
                 " and " + std::to_string(i) + " of matrix " + std::to_string(matrix) +
                 " at the shared addresses " + std::to_string(other.row_smem) + " and " +
                 std::to_string(row.row_smem) + ", in the same banks",
             row.code);
      return;
    }
  }
}

void move(const Collective& warp, uint32_t matrix, unsigned lane) {
  const auto& own = warp.argument<Transfer>(lane);
  unsigned char* halves[] = {element(warp, matrix, lane, 0), element(warp, matrix, lane, 1)};
  if (options.race) {
    const bool adjacent = halves[0] + kElementBytes == halves[1];
    watch(warp, lane, halves[0], adjacent ? 2 * kElementBytes : kElementBytes);
    if (!adjacent) watch(warp, lane, halves[1], kElementBytes);
  }
  auto* word = reinterpret_cast<unsigned char*>(own.words + matrix);
  for (uint32_t half = 0; half < 2; ++half) {
    unsigned char* part = word + half * kElementBytes;
    std::memcpy(own.stores ? halves[half] : part, own.stores ? part : halves[half], kElementBytes);
  }
}

void run(const Transfer& transfer) {
  Thread& thread = block.self();
  // Only the first lanes' addresses count where there are fewer than four matrices.
  if (thread.lane < kMatrixRows * transfer.matrices) {
    if (transfer.row_smem % kRowBytes != 0) {
      fail("misaligned",
           std::string(transfer.name) + " by " + name_of(thread) + " with the shared address " +
               std::to_string(transfer.row_smem) + ", which is not a multiple of 16",
           transfer.code);
    }
    if (transfer.row_smem > kSharedBytesLimit - kRowBytes) {
      fail("out of bounds",
           std::string(transfer.name) + " by " + name_of(thread) + " with the shared address " +
               std::to_string(transfer.row_smem),
           transfer.code);
    }
  }
  if (options.race) preempt();
  Transfer argument = transfer;
  join_whole_warp(
      transfer.name, &argument,
      [](Collective& warp) {
        const uint32_t matrices = warp.argument<Transfer>(0).matrices;
        for (uint32_t matrix = 0; matrix < matrices; ++matrix) {
          if (options.bank_conflicts) look_for_bank_conflicts(warp, matrix);
          for (unsigned lane = 0; lane < kWarpSize; ++lane) move(warp, matrix, lane);
        }
      },
      transfer.code);
}

void store(const char* name, uint32_t row_smem, const uint32_t (&words)[4], bool transposed,
           const void* code) {
  uint32_t copy[4];
  std::memcpy(copy, words, sizeof copy);
  run({name, row_smem, copy, 4, transposed, true, code});
}

}  // namespace

void ldmatrix_x1(uint32_t (&words)[1], uint32_t row_smem) {
  run({"ldmatrix.x1", row_smem, words, 1, false, false, __builtin_return_address(0)});
}

void ldmatrix_x2(uint32_t (&words)[2], uint32_t row_smem) {
  run({"ldmatrix.x2", row_smem, words, 2, false, false, __builtin_return_address(0)});
}

void ldmatrix_x4(uint32_t (&words)[4], uint32_t row_smem) {
  run({"ldmatrix.x4", row_smem, words, 4, false, false, __builtin_return_address(0)});
}

void ldmatrix_x1_trans(uint32_t (&words)[1], uint32_t row_smem) {
  run({"ldmatrix.x1.trans", row_smem, words, 1, true, false, __builtin_return_address(0)});
}

void ldmatrix_x2_trans(uint32_t (&words)[2], uint32_t row_smem) {
  run({"ldmatrix.x2.trans", row_smem, words, 2, true, false, __builtin_return_address(0)});
}

void ldmatrix_x4_trans(uint32_t (&words)[4], uint32_t row_smem) {
  run({"ldmatrix.x4.trans", row_smem, words, 4, true, false, __builtin_return_address(0)});
}

void stmatrix_x4(uint32_t row_smem, const uint32_t (&words)[4]) {
  store("stmatrix.x4", row_smem, words, false, __builtin_return_address(0));
}

void stmatrix_x4_trans(uint32_t row_smem, const uint32_t (&words)[4]) {
  store("stmatrix.x4.trans", row_smem, words, true, __builtin_return_address(0));
}

}  // namespace llmkernels::emulator
