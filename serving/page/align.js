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

/** The cosine of every frame of A with every frame of B, (n, m) in a row. */
export function similarities(framesA, framesB, dim) {
  const a = normalised(framesA, dim);
  const b = normalised(framesB, dim);
  const [n, m] = [a.length / dim, b.length / dim];
  const found = new Float32Array(n * m);
  const whole = dim - (dim % 4);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < m; j++) {
      const [p, q] = [i * dim, j * dim];
      let [w, x, y, z] = [0, 0, 0, 0]; // four sums at once: one would wait for itself
      for (let d = 0; d < whole; d += 4) {
        w += a[p + d] * b[q + d];
        x += a[p + d + 1] * b[q + d + 1];
        y += a[p + d + 2] * b[q + d + 2];
        z += a[p + d + 3] * b[q + d + 3];
      }
      for (let d = whole; d < dim; d++) w += a[p + d] * b[q + d];
      found[i * m + j] = w + x + y + z;
    }
  }
  return found;
}

/**
 * Dynamic time warping under 1 - similarity (n, m): the path from both beginnings to both ends that goes only forward
 * and has the least sum (Sakoe & Chiba 1978). For every frame of A: the first and the last frame of B on the path, and
 * their mean similarity; `path` is the mean over the whole of it. `turned`: B's last frame comes first.
 */
export function warp(similarity, n, m, turned = false) {
  const at = turned ? (i, j) => similarity[i * m + m - 1 - j] : (i, j) => similarity[i * m + j];
  const moves = new Uint8Array(n * m); // 0: both, 1: A alone, 2: B alone
  let row = new Float64Array(m + 1).fill(Infinity);
  row[0] = 0;
  for (let i = 0; i < n; i++) {
    const next = new Float64Array(m + 1).fill(Infinity);
    for (let j = 0; j < m; j++) {
      let best = row[j];
      let move = 0;
      if (row[j + 1] < best) {
        best = row[j + 1];
        move = 1;
      }
      if (next[j] < best) {
        best = next[j];
        move = 2;
      }
      next[j + 1] = best + 1 - at(i, j);
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
    likeness[i] += at(i, j);
    onPath += at(i, j);
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
    const found = similarities(a, b, dim);
    const [n, m] = [a.length / dim, b.length / dim];
    // A path finds something alike in any two recordings: how much, B played backwards tells.
    const chance = warp(found, n, m, true).path;
    self.postMessage({ ...warp(found, n, m), chance, edits: editDistance(unitsA, unitsB) });
  };
}
