// The plan of one step: which tiles of queries there are, how many KV tiles each visits, and how they are dealt to the
// workers: thread blocks, or clusters of them.
//
// It depends on lengths alone, so one plan serves every layer of a model. It is made on the device from device lengths:
// no host synchronisation, and a CUDA graph replays it with whatever the lengths have become. The tensor that holds it
// says itself where its parts are, so that a kernel captured with one batch size reads a plan made for another.
//
// Of a decode step over page lists it is the plan of dense attention, and says whether any sequence has a list. Where
// one has, the lists are dealt without it (page_scheduler.cuh).
#pragma once

#include "params.h"
#include "sm90/launch.h"
#include "sm90/sequence.cuh"

namespace lite_attention::sm90 {

// An item is an entry and a head tile. Items are dealt in two ways, and a plan has one or both. The KV tiles of the
// first items, laid end to end, are cut into num_workers equal runs; an item on a cut is computed in parts by
// consecutive workers ("stream-K", arXiv 2301.03598), and the part that arrives last adds them up. The others are taken
// whole: a worker that is done takes the next one.
struct PlanHeader {
  int64_t streamed;  // weight of the items that are streamed, in each column
  int64_t run;       // what one worker takes of it
  int num_entries;
  int num_items, first_whole;
  int block_m, block_n, pack, num_workers;  // whom it was made for
  int entries, prefix;                      // where these arrays begin, in words from the header
  int columns;                              // of the streamed items
  int last_heads;  // that are worked on side by side, the last ones of those whose items are taken whole
  int listed;      // whether any sequence of the step decodes from a list of pages (page_scheduler.cuh)
  // Items taken after each worker's first, and workers that found no more; zero between launches.
  int taken, finished;
};

// How streamed items are dealt: head tiles in columns, neighbours in neighbouring ones, and to each worker a run of one
// column. So workers beside each other walk the keys of neighbouring heads at one time, which are neighbours in memory
// where a token has all its heads side by side.
struct Columns {
  int columns, runs;  // runs of a column, each for one worker; some workers may have none

  __device__ Columns(int columns, int num_workers) : columns(columns), runs(num_workers / columns) {}

  // For so many head tiles: as many as leave few workers without a run, and read long rows.
  __device__ static int of(int head_tiles) {
    for (int columns : {4, 6, 5, 3, 7, 2}) {
      if (head_tiles % columns == 0) return columns;
    }
    return 1;
  }

  __device__ int column(int worker) const { return worker % columns; }
  __device__ int run(int worker) const { return worker / columns; }
  __device__ bool has(int worker) const { return run(worker) < runs; }
  // Runs of all columns, by which parts and their sums are kept.
  __device__ int first_run(int column) const { return column * runs; }
  // The head tile that is `place`th in a column.
  __device__ int head_tile(int place, int column) const { return place * columns + column; }
};

struct Work {
  int batch, m_tile, head_tile;
  int n_begin, n_end;  // KV tiles of this part; none where the rows see no key
  int parts;           // that this item has; 1 is unsplit, 0 is the end of all work
  int part;            // which of them this is, from the item's first tiles on
  int first_run;       // what has the first one
  Sequence seq;        // read once here, so that nobody else waits for device memory

  // From what the plan calls a sequence, one KV head of one, to the sequence and its head tile.
  __device__ void to_call(const PageLists& lists, const Packing& packing) {
    if (!lists.indices) return;
    head_tile += batch % lists.heads * packing.head_tiles;
    batch /= lists.heads;
  }
};

// What a worker of few rows begins with where all is streamed, found by one load: a chain of loads and divisions before
// the first keys is felt in a decode step. Its sequences begin where they would in packed tensors, and where lists are
// of KV heads their numbers are those of the call.
struct alignas(16) Start {
  static constexpr int kItems = 2;
  Work items[kItems];
  int valid;                     // zero where something is taken whole: nothing else is set then
  int position, end;             // of the run
  int entry, place, head_begin;  // of what comes after the items
};

// The arrays of a plan. After the header come the arrival counters, one a block of each worker, zero between launches.
struct Plan {
  PlanHeader* header;
  int* arrivals;  // (blocks) parts of a split item that are done, counted at the run where the item begins
  int4* entries;  // (num_entries) batch, m_tile, first KV tile, number of KV tiles
  int* prefix;    // (num_entries + 1) exclusive sums of the entries' weights

  static __host__ __device__ const int* listed(const int* words) {
    return &reinterpret_cast<const PlanHeader*>(words)->listed;
  }

  __device__ explicit Plan(int* words)
      : header(reinterpret_cast<PlanHeader*>(words)),
        arrivals(words + sizeof(PlanHeader) / 4),
        entries(reinterpret_cast<int4*>(words + header->entries)),
        prefix(words + header->prefix) {}

  // In words from the header. After the arrival counters, of which there are as many where clusters are single blocks.
  __host__ __device__ static int starts(int blocks) { return (int(sizeof(PlanHeader)) / 4 + blocks + 3) / 4 * 4; }

  // Brings to L2 what a worker with a Start reads first. The kernel before may still write it.
  __device__ static void prefetch(const int* words, int num_workers, int worker) {
    for (const int* from : {words, words + starts(num_workers) + worker * int(sizeof(Start) / 4)}) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
    }
  }
};

// Sizes that host code knows without reading a length.
struct PlanBounds {
  int batch, blocks, num_workers;
  int max_entries;

  PlanBounds(int batch, int64_t total_q, int tokens_per_tile, int multiprocessors, int cluster)
      : batch(batch),
        blocks(multiprocessors),
        num_workers(multiprocessors / cluster),
        max_entries(int(total_q / tokens_per_tile) + batch) {}

  __host__ __device__ int entries() const { return Plan::starts(blocks) + int(sizeof(Start)) / 4 * blocks; }
  __host__ __device__ int prefix() const { return entries() + 4 * max_entries; }
  __host__ __device__ int offsets() const {
    return prefix() + max_entries + 1;
  }  // (batch + 1) first entry of each place in the order of sequences: the plan kernel's scratch
  __host__ __device__ int order() const { return offsets() + batch + 1; }  // (batch) sequences in that order: scratch
  int64_t words() const { return int64_t{order()} + batch; }
};

// Of a step that decodes from lists, the sequences that list everything: short ones, and those marked.
struct WholeSequences {
  int min_context = 0;
  const bool* marked = nullptr;  // (batch) or null
};

// With `never_split` all items are taken whole, whatever the lengths: a row's result then depends on nothing else in
// the batch.
cudaError_t launch_plan(int* words, const PlanBounds& bounds, const Lengths& lengths, const WholeSequences& whole,
                        const Packing& packing, const Tile& tile, bool never_split, cudaStream_t stream);

}  // namespace lite_attention::sm90
