"""For each refusal a model that is refused and, where the model is what to change, the mended one.

They are on the page of the refusal (tools/docs.py) and tests/test_docs.py inspects each of them.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

HEADS = "self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))"
SPLIT = "q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))\n"
PLAIN = SPLIT + "return (q @ k.mT).softmax(-1) @ v"


@dataclass(frozen=True)
class Example:
    """The parts of a module and the body of its forward; ``mended`` is empty where another site is the remedy."""

    parts: str
    fails: str
    mended: str = ""
    mended_parts: str = ""  # those of the mended module, if they are others
    inputs: str = "torch.randn(2, 5, 8)"
    before: str = ""  # classes that the parts need
    arguments: str = "x"
    explained: bool = False  # it is a row of gatecc.explain, not of gatecc.inspect

    def code(self, mended: bool) -> str:
        """A block that defines ``model`` and ``example_inputs``."""
        body = self.mended if mended else self.fails
        parts = (self.mended_parts if mended else "") or self.parts
        head = "class Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        return (
            f"{self.before}{head}{textwrap.indent(parts, ' ' * 8)}\n\n"
            f"    def forward(self, {self.arguments}):\n{textwrap.indent(body, ' ' * 8)}\n\n"
            f"model, example_inputs = Model(), ({self.inputs},)"
        )


EXAMPLES: dict[str, Example] = {
    "GCC101": Example(
        f"{HEADS}\nself.talk = nn.Linear(2, 2)  # over the heads",
        f"{SPLIT}weights = (q @ k.mT).softmax(-1)\nreturn self.talk(weights.movedim(1, -1)).movedim(-1, 1) @ v",
        f"{SPLIT}out = (q @ k.mT).softmax(-1) @ v\nreturn self.talk(out.movedim(1, -1)).movedim(-1, 1)",
    ),
    "GCC107": Example(
        f"{HEADS}\nself.talk = nn.Linear(2, 2)  # over the heads",
        f"{SPLIT}scores = self.talk((q @ k.mT).movedim(1, -1)).movedim(-1, 1)\nreturn scores.softmax(-1) @ v",
        f"{SPLIT}out = (q @ k.mT).softmax(-1) @ v\nreturn self.talk(out.movedim(1, -1)).movedim(-1, 1)",
    ),
    "GCC108": Example(
        HEADS,
        f"{SPLIT}return (q @ k.mT).relu().square() @ v",
        f"{SPLIT}return (q @ k.mT).softmax(-1) @ v",
        explained=True,
    ),
    "GCC102": Example(
        "self.score, self.v = nn.Linear(8, 1), nn.Linear(8, 8)",
        "return self.score(x).softmax(1).mT @ self.v(x)",
        "return (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)",
        HEADS,
    ),
    "GCC103": Example(
        "self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)",
        "return (self.q(x) @ self.k(x).mT).softmax(-1)  # a pointer",
        "return (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)",
        HEADS,
    ),
    "GCC104": Example(HEADS, f"{SPLIT}return (q @ k.mT).softmax(-2) @ v", PLAIN),
    "GCC105": Example(
        f"{HEADS}\nself.requires_grad_(False)  # flex_attention has no gradients on a CPU",
        f"{SPLIT}return flex_attention(q, k, v)",
        f"{SPLIT}return nn.functional.scaled_dot_product_attention(q, k, v)",
        HEADS,
        before="from torch.nn.attention.flex_attention import flex_attention\n\n",
    ),
    "GCC185": Example(
        HEADS,
        "def attend(x):\n"
        + textwrap.indent(f"{SPLIT}return (q @ k.mT).softmax(-1) @ v", " " * 4)
        + "\n\ndef copy(x):\n    return x.unflatten(-1, (2, 4)).transpose(1, 2).contiguous()\n\n"
        "return torch.cond(x.sum() > 0, attend, copy, (x,))",
        PLAIN,
    ),
    "GCC106": Example(
        HEADS,
        f'{SPLIT}return torch.einsum("bhnm,bhmd,bhnd->bhnd", (q @ k.mT).softmax(-1), v, q)',
        f"{SPLIT}return (q @ k.mT).softmax(-1) @ v * q",
    ),
    "GCC130": Example(
        "self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))",
        "return self.layer(x)",
        "return self.layer(x)",
        "self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))\n"
        'nn.utils.parametrize.remove_parametrizations(self.layer, "weight")',
    ),
    "GCC131": Example("self.w = nn.Parameter(torch.randn(2, 8, 8))", "return x @ self.w"),
    "GCC132": Example("self.w = nn.Parameter(torch.randn(5, 5))", "return self.w @ x", "return (x.mT @ self.w.T).mT"),
    "GCC186": Example(
        "self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)",
        "return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,))",
        "return torch.where(x.sum() > 0, self.a(x), self.b(x))",
    ),
    "GCC140": Example(
        "self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)",
        "return self.c(self.b(self.a(x).relu()).relu())",
        "return self.c(self.a(x).relu())",
    ),
    "GCC141": Example(
        "self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 3)",
        "return self.down(self.up(x).relu())",
        "return self.down(self.up(x).relu())",
        "self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)",
    ),
    "GCC142": Example(
        "self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)",
        "return x * self.down(self.up(x.mean(1)).relu()).sigmoid().unsqueeze(1)",
        "return x * self.down(self.up(x).relu()).sigmoid()",
    ),
    "GCC143": Example(
        "self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)\nself.table = nn.Parameter(torch.randn(1, 1, 8))",
        "return x + self.down(self.up(self.table).relu())",
        "return x + self.down(self.up(x).relu())",
    ),
    "GCC144": Example(
        "self.experts = Experts()",
        "y, again = self.experts(x)\nreturn y + again",
        before=(
            "class Experts(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.up, self.down = nn.Parameter(torch.randn(2, 8, 16)), nn.Parameter(torch.randn(2, 16, 8))\n\n"
            "    def forward(self, x):\n        y = (x @ self.up).relu() @ self.down\n        return y, 2 * y\n\n"
        ),
    ),
    "GCC150": Example(
        "self.embed, self.position = nn.Linear(8, 8), nn.Parameter(torch.randn(1, 5, 8))",
        "return self.embed(x) + self.position",
    ),
    "GCC151": Example(
        "self.q, self.k, self.r = (nn.Linear(8, 8) for _ in range(3))",
        "q, k = self.q(x), self.k(x)\nreturn (q @ k.mT + q @ self.r(x).mT).softmax(-1) @ x",
    ),
    "GCC152": Example(
        "self.f = nn.Linear(8, 8)",
        "return self.f(x) + (1 - mask[..., None]) * torch.full((8,), -1e4)",
        inputs="torch.randn(2, 5, 8), torch.ones(2, 5)",
        arguments="x, mask",
    ),
    "GCC160": Example(
        "self.tokens, self.places = nn.Embedding(9, 8), nn.Embedding(16, 8)",
        "return self.tokens(x) + self.places(torch.arange(x.shape[1]))",
        inputs="torch.randint(0, 9, (2, 5))",
    ),
    "GCC161": Example(
        "self.f, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)",
        "return self.norm(x + self.f(x))",
        "return self.head(self.norm(x + self.f(x)))",
    ),
    "GCC170": Example(
        "self.layers = nn.ModuleList([Layer(8, 4), Layer(4, 4), Layer(4, 4)])",
        "for layer in self.layers:\n    x = layer(x)\nreturn x",
        "for layer in self.layers:\n    x = layer(x)\nreturn x",
        "self.layers = nn.ModuleList([Layer(8, 8), Layer(8, 8), Layer(8, 8)])",
        before=(
            "class Layer(nn.Module):\n    def __init__(self, width, out):\n        super().__init__()\n"
            "        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, out)\n\n"
            "    def forward(self, x):\n        return self.down(self.up(x).relu())\n\n"
        ),
    ),
    "GCC171": Example(
        "self.layers = nn.ModuleList([Two(), Two()])",
        "y = x.roll(1, 0)\nfor layer in self.layers:\n    x, y = layer(x, y)\nreturn x + y",
        before=(
            "class Two(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8)\n\n"
            "    def forward(self, x, y):\n        return x + self.f(y), y + self.g(x)\n\n"
        ),
    ),
}
