"""The recurrence of linear attention in lines of ONNX, from operators of opset 18.

Both read state: (B, H, Dk, E), q, k: (B, H, N, Dk), v: (B, H, N, E), and decay: (B, H, N, Dk or 1) and beta:
(B, H, N, 1) where the rule has them; they assign o: (B, H, N, E) and ``final``, the state after the last token.
"""

from __future__ import annotations

from collections.abc import Iterator

CHUNK, BLOCK = 32, 8
_STRONGEST = -16.0  # a decay below forgets all but 1e-7 of a state
_LARGEST = _STRONGEST * BLOCK / -2  # e to this is finite


def by_token(gated: bool) -> list[str]:
    """One token after the other, for the delta rules.

    S_t = e^(g_t) S_(t-1) + k_t beta_t (v_t - k_t e^(g_t) S_(t-1)), o_t = q_t S_t.
    """
    rows = ["q", "k", "v", "beta"] + ["decay"] * gated
    body = [
        "kept = Mul (past, keep)" if gated else "kept = Identity (past)",
        "column = Transpose <perm = [0, 1, 3, 2]> (k_t)",
        "held = MatMul (k_t, kept)",
        "new = Sub (v_t, held)",
        "written = Mul (new, beta_t)",
        "added = MatMul (column, written)",
        "next = Add (kept, added)",
        "o_t = MatMul (q_t, next)",
    ]
    if gated:
        body = ["turned = Transpose <perm = [0, 1, 3, 2]> (decay_t)", "keep = Exp (turned)", *body]
    return [
        "row = Constant <value = int64[1] {3}> ()",
        *(line for name in rows for line in _token_rows(name)),
        _scan("final, os", ["state"], [f"{name}s" for name in rows], body, [f"{name}_t" for name in rows], "o_t"),
        "o_ = Transpose <perm = [1, 2, 0, 3, 4]> (os)",
        "o = Squeeze (o_, row)",
    ]


def _token_rows(name: str) -> Iterator[str]:
    """(B, H, N, D) -> (N, B, H, 1, D)."""
    yield f"{name}_ = Unsqueeze ({name}, row)"
    yield f"{name}s = Transpose <perm = [2, 0, 1, 3, 4]> ({name}_)"


def by_chunk(Dk: int, E: int, decays: int) -> list[str]:
    """Chunk by chunk, without a correction; ``decays`` is the width of the decays, 0 without any.

    What a chunk's tokens write is known before the state is, so that the loop is one product and one sum. Inside a
    chunk the recurrence is masked attention with weights q_i k_j e^(b_i - b_j), b the running sum of log decays (Yang
    et al. 2024, GLA). One decay for all channels is taken as that difference; of one for each channel, e^(b_i - m) and
    e^(m - b_j) are finite for m the sum in the middle of the block of 8 that i lies in.
    """
    return [*_constants(Dk, E, decays), *_by_chunk(decays, "o", "final")]


def by_chunk_or_step(Dk: int, E: int, decays: int) -> list[str]:
    """``by_chunk``, and one token by itself, which takes a tenth of a chunk."""
    step = [
        "column = Transpose <perm = [0, 1, 3, 2]> (k)",
        "added = MatMul (column, v)",
        *(_FADED if decays else ["faded = Identity (state)"]),
        "one_final = Add (faded, added)",
        "one_o = MatMul (q, one_final)",
    ]
    one = f"one () => (float one_o, float one_final) {{ {' '.join(step)} }}"
    more = f"more () => (float all_o, float all_final) {{ {' '.join(_by_chunk(decays, 'all_o', 'all_final'))} }}"
    return [
        *_constants(Dk, E, decays),
        "one_token = Constant <value = int64[1] {1}> ()",
        "tokens_given = Shape <start = 2, end = 3> (q)",
        "is_one = Equal (tokens_given, one_token)",
        f"o, final = If <then_branch = {one}, else_branch = {more}> (is_one)",
    ]


_FADED = [
    "keep_row = Exp (decay)",
    "keep = Transpose <perm = [0, 1, 3, 2]> (keep_row)",
    "faded = Mul (state, keep)",
]


def _constants(Dk: int, E: int, decays: int) -> list[str]:
    blocks = {"q_blocks": Dk, "b_blocks": decays} if decays > 1 else {}
    lists = {
        "chunk": [CHUNK],
        "nothing": [0] * 6,
        "zero": [0],
        "tokens": [2],
        "rows": [3],
        "inner": [4],
        "end": [CHUNK - 1],
        "half": [BLOCK // 2],
        "behind_half": [BLOCK // 2 + 1],
        "square": [0, 0, 0, CHUNK, CHUNK],
        "whole": [0, 0, -1, E],
        **{f"{name}_shape": [0, 0, -1, CHUNK, width] for name, width in _widths(Dk, E, decays).items()},
        **{name: [0, 0, 0, CHUNK // BLOCK, BLOCK, width] for name, width in blocks.items()},
    }
    numbers = {"strongest": _STRONGEST, "largest": _LARGEST, "none": 0.0}
    return [
        *(f"{n} = Constant <value = int64[{len(x)}] {{{', '.join(map(str, x))}}}> ()" for n, x in lists.items()),
        *(f"{n} = Constant <value = float {{{x}}}> ()" for n, x in numbers.items()),
        "axis = Constant <value = int64 {3}> ()",
    ]


def _widths(Dk: int, E: int, decays: int) -> dict[str, int]:
    return {"q": Dk, "k": Dk, "v": E, **({"decay": decays} if decays else {})}


def _by_chunk(decays: int, o: str, final: str) -> Iterator[str]:
    yield "length = Shape <start = 2, end = 3> (q)"
    yield "behind = Neg (length)"
    yield "missing = Mod (behind, chunk)"
    yield "pads = Concat <axis = 0> (nothing, missing, zero)"
    for name in _widths(0, 0, decays):  # zeros, which change nothing, after the last token: (B, H, chunks, C, D)
        yield f"{name}_padded = Pad ({name}, pads)"
        yield f"{name}c = Reshape ({name}_padded, {name}_shape)"
    yield from _forgetting() if decays else ("writes = Identity (kc)", "reads = Identity (qc)")
    yield from _scores(decays)
    yield "seen = Trilu <upper = 0> (scores)"
    yield "inside = MatMul (seen, vc)"
    yield "turned = Transpose <perm = [0, 1, 2, 4, 3]> (writes)"
    yield "added = MatMul (turned, vc)"
    yield "addeds = Transpose <perm = [2, 0, 1, 3, 4]> (added)"
    yield _states(bool(decays), final)
    yield "before = Transpose <perm = [1, 2, 0, 3, 4]> (befores)"
    yield "across = MatMul (reads, before)"
    yield "oc = Add (inside, across)"
    yield "padded = Reshape (oc, whole)"
    yield f"{o} = Slice (padded, zero, length, tokens)"


def _forgetting() -> Iterator[str]:
    """b, and what the tokens read of the state before the chunk and leave in that behind it."""
    yield "bounded = Max (decayc, strongest)"
    yield "b = CumSum (bounded, axis)"
    yield "last = Slice (b, end, chunk, rows)"
    yield "until = Sub (last, b)"
    yield "left = Exp (until)"
    yield "writes = Mul (kc, left)"
    yield "since = Exp (b)"
    yield "reads = Mul (qc, since)"
    yield "kept = Exp (last)"
    yield "kepts = Transpose <perm = [2, 0, 1, 4, 3]> (kept)"


def _scores(decays: int) -> Iterator[str]:
    """q_i k_j e^(b_i - b_j) for j <= i, anything above."""
    if decays > 1:
        yield from _scores_by_block()
        return
    yield "column = Transpose <perm = [0, 1, 2, 4, 3]> (kc)"
    yield f"{'products' if decays else 'scores'} = MatMul (qc, column)"
    if decays:
        yield "b_row = Transpose <perm = [0, 1, 2, 4, 3]> (b)"
        yield "apart = Sub (b, b_row)"
        yield "bound = Min (apart, none)"  # later tokens are not seen
        yield "fading = Exp (bound)"
        yield "scores = Mul (products, fading)"


def _scores_by_block() -> Iterator[str]:
    yield "q_block = Reshape (qc, q_blocks)"
    yield "b_block = Reshape (b, b_blocks)"
    yield "middle = Slice (b_block, half, behind_half, inner)"
    yield "q_apart = Sub (b_block, middle)"
    yield "q_fading = Exp (q_apart)"
    yield "q_faded = Mul (q_block, q_fading)"
    yield "b_all = Unsqueeze (b, rows)"
    yield "k_all = Unsqueeze (kc, rows)"
    yield "k_apart = Sub (middle, b_all)"
    yield "k_bound = Min (k_apart, largest)"  # keys behind the block are not seen
    yield "k_fading = Exp (k_bound)"
    yield "k_faded = Mul (k_all, k_fading)"
    yield "column = Transpose <perm = [0, 1, 2, 3, 5, 4]> (k_faded)"
    yield "block_scores = MatMul (q_faded, column)"
    yield "scores = Reshape (block_scores, square)"


def _states(gated: bool, final: str) -> str:
    """The states before each chunk, and after the last."""
    body = [
        "before_t = Identity (past)",
        "kept_state = Mul (past, kept_t)" if gated else "kept_state = Identity (past)",
        "next = Add (kept_state, added_t)",
    ]
    rows = {"kepts": "kept_t", "addeds": "added_t"} if gated else {"addeds": "added_t"}
    return _scan(f"{final}, befores", ["state"], list(rows), body, list(rows.values()), "before_t")


def _scan(results: str, states: list[str], rows: list[str], body: list[str], inner: list[str], yields: str) -> str:
    read = ", ".join(f"float {name}" for name in ("past", *inner))
    step = f"step ({read}) => (float next, float {yields}) {{ {' '.join(body)} }}"
    return f"{results} = Scan <num_scan_inputs = {len(rows)}, body = {step}> ({', '.join([*states, *rows])})"
