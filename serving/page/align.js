/** Two recordings side by side: which stretch of B sounds most like each frame of A. Runs in a worker. */

/** How many insertions, deletions and substitutions turn one sequence into the other, at least (Levenshtein). */
export function editDistance(a, b) {
  let row = Uint32Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = new Uint32Array(b.length + 1);
    next[0] = i;
    for (let j = 1; j <= b.length; j++) {
      next[j] = Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1));
    }
    row = next;
  }
  return row[b.length];
}

/** Every row of length 1. */
function normalised(frames, dim) {
  const unit = new Float32Array(frames.length);
  for (let at = 0; at < frames.length; at += dim) {
    let sum = 0;
    for (let d = 0; d < dim; d++) sum += frames[at + d] * frames[at + d];
    const scale = 1 / Math.sqrt(sum || 1);
    for (let d = 0; d < dim; d++) unit[at + d] = frames[at + d] * scale;
  }
  return unit;
}

/** The same rows, the last first. */
function backwards(rows, dim) {
  const turned = new Float32Array(rows.length);
  for (let at = 0; at < rows.length; at += dim) turned.set(rows.subarray(at, at + dim), rows.length - at - dim);
  return turned;
}

/**
 * Dynamic time warping of frames (T, dim) under the cosine: the path from both beginnings to both ends that goes only
 * forward and has the least sum of distances (Sakoe & Chiba 1978). For every frame of A: the first and the last frame
 * of B on the path, and their mean similarity; `path` is the mean over the whole of it.
 */
export function warp(framesA, framesB, dim) {
  const a = normalised(framesA, dim);
  const b = normalised(framesB, dim);
  const n = a.length / dim;
  const m = b.length / dim;
  const moves = new Uint8Array(n * m); // 0: both, 1: A alone, 2: B alone
  const similarity = new Float32Array(n * m);
  let row = new Float64Array(m + 1).fill(Infinity);
  row[0] = 0;
  for (let i = 0; i < n; i++) {
    const next = new Float64Array(m + 1).fill(Infinity);
    for (let j = 0; j < m; j++) {
      let cosine = 0;
      for (let d = 0, p = i * dim, q = j * dim; d < dim; d++) cosine += a[p + d] * b[q + d];
      similarity[i * m + j] = cosine;
      let best = row[j];
      let move = 0;
      if (row[j + 1] < best) [best, move] = [row[j + 1], 1];
      if (next[j] < best) [best, move] = [next[j], 2];
      next[j + 1] = best + 1 - cosine;
      moves[i * m + j] = move;
    }
    row = next;
  }
  const first = new Int32Array(n);
  const last = new Int32Array(n).fill(-1);
  const likeness = new Float32Array(n);
  let onPath = 0;
  let steps = 0;
  for (let i = n - 1, j = m - 1; i >= 0 && j >= 0; ) {
    if (last[i] < 0) last[i] = j;
    first[i] = j;
    likeness[i] += similarity[i * m + j];
    onPath += similarity[i * m + j];
    steps++;
    const move = moves[i * m + j];
    if (move !== 2) i--;
    if (move !== 1) j--;
  }
  for (let i = 0; i < n; i++) likeness[i] /= last[i] - first[i] + 1;
  return { first, last, likeness, path: onPath / steps };
}

if (typeof WorkerGlobalScope !== "undefined" && self instanceof WorkerGlobalScope) {
  self.onmessage = ({ data: { a, b, dim, unitsA, unitsB } }) => {
    // A path finds something alike in any two recordings: how much, B played backwards tells.
    const chance = warp(a, backwards(b, dim), dim).path;
    self.postMessage({ ...warp(a, b, dim), chance, edits: editDistance(unitsA, unitsB) });
  };
}
