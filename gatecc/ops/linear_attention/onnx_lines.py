"""The recurrence of linear attention in lines of ONNX, from operators of opset 18.

Both read state: (B, H, Dk, E), q, k: (B, H, N, Dk), v: (B, H, N, E), and decay: (B, H, N, Dk or 1) and beta:
(B, H, N, 1) where the rule has them; they assign o: (B, H, N, E) and ``final``, the state after the last token.
"""

from __future__ import annotations

from collections.abc import Iterator

CHUNK, BLOCK = 32, 8
_STRONGEST = -16.0  # a decay below forgets all but 1e-7 of a state
_LARGEST = _STRONGEST * BLOCK / -2  # e to this is finite
_FLOAT = "float state, float {}"


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
    widths = {"q": Dk, "k": Dk, "v": E, **({"decay": decays} if decays else {})}
    return [
        f"chunk = Constant <value = int64[1] {{{CHUNK}}}> ()",
        "nothing = Constant <value = int64[6] {0, 0, 0, 0, 0, 0}> ()",
        "zero = Constant <value = int64[1] {0}> ()",
        "length = Shape <start = 2, end = 3> (q)",
        "behind = Neg (length)",
        "missing = Mod (behind, chunk)",
        "pads = Concat <axis = 0> (nothing, missing, zero)",
        *(line for name, width in widths.items() for line in _chunks(name, width)),
        *(_forgetting(decays) if decays else ("writes = Identity (kc)", "reads = Identity (qc)")),
        *(_weights(Dk, decays) if decays else ("column = Transpose <perm = [0, 1, 2, 4, 3]> (kc)", _PRODUCT)),
        "seen = Trilu <upper = 0> (scores)",
        "inside = MatMul (seen, vc)",
        "turned = Transpose <perm = [0, 1, 2, 4, 3]> (writes)",
        "added = MatMul (turned, vc)",
        "addeds = Transpose <perm = [2, 0, 1, 3, 4]> (added)",
        _states(bool(decays)),
        "before = Transpose <perm = [1, 2, 0, 3, 4]> (befores)",
        "across = MatMul (reads, before)",
        "oc = Add (inside, across)",
        f"whole = Constant <value = int64[4] {{0, 0, -1, {E}}}> ()",
        "padded = Reshape (oc, whole)",
        "tokens = Constant <value = int64[1] {2}> ()",
        "o = Slice (padded, zero, length, tokens)",
    ]


_PRODUCT = "scores = MatMul (qc, column)"


def _chunks(name: str, width: int) -> Iterator[str]:
    """(B, H, N, D) -> (B, H, chunks, C, D), with zeros, which change nothing, after the last token."""
    yield f"{name}_padded = Pad ({name}, pads)"
    yield f"{name}_shape = Constant <value = int64[5] {{0, 0, -1, {CHUNK}, {width}}}> ()"
    yield f"{name}c = Reshape ({name}_padded, {name}_shape)"


def _forgetting(decays: int) -> Iterator[str]:
    """b, and what the tokens read of the state before the chunk and leave in that behind it."""
    yield f"strongest = Constant <value = float {{{_STRONGEST}}}> ()"
    yield "decayc_ = Max (decayc, strongest)"
    yield "axis = Constant <value = int64 {3}> ()"
    yield "b = CumSum (decayc_, axis)"
    yield f"end = Constant <value = int64[1] {{{CHUNK - 1}}}> ()"
    yield "rows = Constant <value = int64[1] {3}> ()"
    yield "last = Slice (b, end, chunk, rows)"
    yield "until = Sub (last, b)"
    yield "faded = Exp (until)"
    yield "writes = Mul (kc, faded)"
    yield "since = Exp (b)"
    yield "reads = Mul (qc, since)"
    yield "kept = Exp (last)"
    yield "kepts = Transpose <perm = [2, 0, 1, 4, 3]> (kept)"


def _weights(Dk: int, decays: int) -> Iterator[str]:
    """scores: q_i k_j e^(b_i - b_j) for j <= i, anything above."""
    if decays == 1:
        yield "column = Transpose <perm = [0, 1, 2, 4, 3]> (kc)"
        yield "products = MatMul (qc, column)"
        yield "b_row = Transpose <perm = [0, 1, 2, 4, 3]> (b)"
        yield "apart = Sub (b, b_row)"
        yield "none = Constant <value = float {0}> ()"
        yield "far = Min (apart, none)"
        yield "fading = Exp (far)"
        yield "scores = Mul (products, fading)"
        return
    for name, width in (("q", Dk), ("b", decays)):
        yield f"{name}_blocks = Constant <value = int64[6] {{0, 0, 0, {CHUNK // BLOCK}, {BLOCK}, {width}}}> ()"
        yield f"{name}b = Reshape ({'qc' if name == 'q' else 'b'}, {name}_blocks)"
    yield f"half = Constant <value = int64[1] {{{BLOCK // 2}}}> ()"
    yield f"behind_half = Constant <value = int64[1] {{{BLOCK // 2 + 1}}}> ()"
    yield "inner = Constant <value = int64[1] {4}> ()"
    yield "middle = Slice (bb, half, behind_half, inner)"
    yield "q_apart = Sub (bb, middle)"
    yield "q_fading = Exp (q_apart)"
    yield "q_block = Mul (qb, q_fading)"
    yield "b_all = Unsqueeze (b, rows)"
    yield "k_all = Unsqueeze (kc, rows)"
    yield "k_apart = Sub (middle, b_all)"
    yield f"largest = Constant <value = float {{{_LARGEST}}}> ()"
    yield "k_bound = Min (k_apart, largest)"  # keys behind the block are not seen
    yield "k_fading = Exp (k_bound)"
    yield "k_block = Mul (k_all, k_fading)"
    yield "k_column = Transpose <perm = [0, 1, 2, 3, 5, 4]> (k_block)"
    yield "block_scores = MatMul (q_block, k_column)"
    yield f"square = Constant <value = int64[5] {{0, 0, 0, {CHUNK}, {CHUNK}}}> ()"
    yield "scores = Reshape (block_scores, square)"


def _states(gated: bool) -> str:
    """The states before each chunk, and after the last."""
    body = ["before_t = Identity (past)", "next = Add (left, added_t)"]
    left = "left = Mul (past, kept_t)" if gated else "left = Identity (past)"
    body.insert(1, left)
    outer, inner = (["kepts", "addeds"], ["kept_t", "added_t"]) if gated else (["addeds"], ["added_t"])
    return _scan("final, befores", ["state"], outer, body, inner, "before_t")


def _scan(results: str, states: list[str], rows: list[str], body: list[str], inner: list[str], yields: str) -> str:
    read = ", ".join(f"float {name}" for name in ("past", *inner))
    step = f"step ({read}) => (float next, float {yields}) {{ {' '.join(body)} }}"
    return f"{results} = Scan <num_scan_inputs = {len(rows)}, body = {step}> ({', '.join([*states, *rows])})"
