"""Trains a small character-level transformer on Python's own reference text, with PyTorch's cross-entropy and with
this package's, from the same seed; then with sparse attention, and under torch.compile. Ends with a table and a figure.
`--attention entmax` learns one alpha for each head."""

import argparse
import os
import statistics
import time
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the memory profiler

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import torch_softmax_ext as tse
from torch_softmax_ext.testing.memory import peak_memory


def causal_mask(length, device):
    """True where the query may see the key."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class Softmax(nn.Module):
    """PyTorch's, with the argument `mask` of this package's maps."""

    def forward(self, scores, mask):
        return torch.softmax(scores.masked_fill(~mask, float("-inf")), -1)


# The maps of the attention scores, made for a number of heads.
ATTENTIONS = {
    "softmax": lambda heads: Softmax(),
    "sparsemax": lambda heads: tse.Sparsemax(),
    "entmax15": lambda heads: tse.Entmax15(),
    "entmax": lambda heads: tse.Entmax(torch.full((heads, 1, 1), 1.5), learnable=True),
}


class Block(nn.Module):
    def __init__(self, width, heads, attention):
        super().__init__()
        self.heads, self.attention = heads, ATTENTIONS[attention](heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def weights(self, x):
        """Attention weights (batch, heads, query, key) and values (batch, heads, key, width / heads)."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5
        return self.attention(scores, mask=causal_mask(length, x.device)), v

    def forward(self, x):
        weights, v = self.weights(x)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    def __init__(self, vocabulary, context, attention, width=128, layers=3, heads=4):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, attention) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def embed(self, tokens):
        return self.token(tokens) + self.position.weight[: tokens.shape[1]]

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.embed(tokens))))


def load_text():
    """Character codes of the reference text, training and validation parts, and the vocabulary."""
    text = "\n".join(topics[name] for name in sorted(topics))
    vocabulary = sorted(set(text))
    index = {c: i for i, c in enumerate(vocabulary)}
    codes = torch.tensor([index[c] for c in text])
    split = len(codes) * 9 // 10
    return codes[:split], codes[split:], vocabulary


def batches(codes, count, batch, context, device, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        start = torch.randint(len(codes) - context - 1, (batch,), generator=generator)
        window = codes[start[:, None] + torch.arange(context + 1)].to(device)
        yield window[:, :-1], window[:, 1:].reshape(-1)


def loss_part(loss_function, logits, target):
    """The loss and the gradient of the logits, apart from the model, so that they can be timed."""
    leaf = logits.detach().requires_grad_()
    loss = loss_function(leaf, target)
    loss.backward()
    return loss.detach(), leaf.grad


def run(name, args, data, loss_function, attention, compiled):
    """Trains a model from the seed; returns its row of the table and its data for the figure."""
    training, validation, vocabulary = data
    torch.manual_seed(args.seed)
    model = LanguageModel(len(vocabulary), args.context, attention).to(args.device)
    groups = [{"params": [p for name, p in model.named_parameters() if "alpha" not in name]}]
    if attention == "entmax":  # alphas learn faster, so that a short run shows where they go
        of_alpha = [block.attention.alpha_logit for block in model.blocks]
        groups.append({"params": of_alpha, "lr": 20 * args.learning_rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    forward, loss_call = model, loss_function
    if compiled:
        forward = torch.compile(model, fullgraph=True)
        loss_call = torch.compile(loss_function, fullgraph=True)
    synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    losses, step_ms, loss_ms = [], [], []
    bar = tqdm(
        batches(training, args.steps, args.batch, args.context, args.device, args.seed),
        total=args.steps, desc=f"{name:34}", mininterval=0.5,
    )  # fmt: skip
    for tokens, target in bar:
        start = time.perf_counter()
        logits = forward(tokens).flatten(0, 1)
        synchronize()
        middle = time.perf_counter()
        loss, gradient = loss_part(loss_call, logits, target)
        synchronize()
        after = time.perf_counter()
        optimizer.zero_grad()
        logits.backward(gradient)
        optimizer.step()
        synchronize()
        end = time.perf_counter()
        losses.append(loss.item())
        step_ms.append((end - start) * 1e3)
        loss_ms.append((after - middle) * 1e3)
        bar.set_postfix(loss=f"{losses[-1]:.3f}", tokens_per_s=f"{target.numel() / (end - start):,.0f}", refresh=False)
    with torch.no_grad():
        held_out = batches(validation, 8, args.batch, args.context, args.device, seed=1)
        validation_loss = statistics.mean(loss_function(model(x).flatten(0, 1), y).item() for x, y in held_out)
    memory = peak_memory(lambda: loss_part(loss_function, logits, target), args.device)
    maps = attention_maps(model, validation[: args.context][None].to(args.device))
    row = [name, statistics.mean(losses[-10:]), validation_loss, zeros(maps).mean().item(), statistics.median(step_ms),
           statistics.median(loss_ms), memory / logits.nbytes]  # fmt: skip
    alphas = [b.attention.alpha.detach().flatten().cpu() for b in model.blocks] if attention == "entmax" else None
    return {"row": row, "losses": losses, "maps": maps, "alphas": alphas, "attention": attention}


def attention_maps(model, tokens):
    """The weights (layer, head, query, key) on one window."""
    with torch.no_grad():
        x, maps = model.embed(tokens), []
        for block in model.blocks:
            maps.append(block.weights(x)[0][0].cpu())
            x = block(x)
    return torch.stack(maps)


def zeros(maps):
    """The share of exact zeros among the weights that are not masked, of each map."""
    return (maps[..., causal_mask(maps.shape[-1], maps.device)] == 0).float().mean(-1)


def draw(runs, path):
    """The losses; a map of each attention; the alphas, where they are learned."""
    shown = {r["attention"]: r for r in runs.values()}
    learned = shown.get("entmax")
    count = 1 + len(shown) + (learned is not None)
    figure, axes = plt.subplots(1, count, figsize=(5 * count, 4.2))
    for name, result in runs.items():
        smooth = torch.tensor(result["losses"]).unfold(0, min(10, len(result["losses"])), 1).mean(1)
        axes[0].plot(smooth, label=name, linewidth=1, linestyle="--" if "PyTorch" in name else "-")
    axes[0].set(title="training loss, mean of 10 steps", xlabel="step", ylabel="nats per character")
    axes[0].legend(fontsize=8)
    for axis, (name, result) in zip(axes[1:], shown.items(), strict=False):
        weights = result["maps"][-1, 0]  # the last layer's first head
        image = axis.imshow(weights.sqrt(), cmap="magma")
        title = f"{name} attention, last layer, head 1: {zeros(weights):.0%} exact zeros"
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="key", ylabel="query")
        figure.colorbar(image, ax=axis, fraction=0.046, label="square root of the weight")
    if learned:
        alphas, shares = torch.stack(learned["alphas"]), zeros(learned["maps"])
        axis = axes[-1]
        image = axis.imshow(alphas, cmap="viridis", vmin=1, vmax=2)
        for layer, head in torch.ones_like(alphas).nonzero().tolist():
            text = f"{alphas[layer, head]:.2f}\n{shares[layer, head]:.0%} zeros"
            color = "white" if alphas[layer, head] < 1.7 else "black"
            axis.text(head, layer, text, ha="center", va="center", color=color)
        axis.set_title("learned alphas", fontsize=10)
        axis.set(xlabel="head", ylabel="layer")
        axis.set_xticks(range(alphas.shape[1]), range(1, alphas.shape[1] + 1))
        axis.set_yticks(range(alphas.shape[0]), range(1, alphas.shape[0] + 1))
        figure.colorbar(image, ax=axis, fraction=0.046, label="1 is softmax, 2 sparsemax")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="training steps of each run")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--compile", choices=["both", "yes", "no"], default="both",
        help="whether to train under torch.compile(fullgraph=True), too or only",
    )  # fmt: skip
    parser.add_argument(
        "--attention", choices=["both", *ATTENTIONS], default="both",
        help="the map of the attention scores; both: softmax and sparsemax; entmax learns its alphas",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--context", type=int, default=128, help="characters a window")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo/train_language_model.png"), help="the figure")
    args = parser.parse_args()

    data = load_text()
    characters = len(data[0]) + len(data[1])
    print(f"{characters:,} characters of Python's reference text, {len(data[2])} different; torch {torch.__version__}")
    runs = {}
    for compiled in {"both": (False, True), "yes": (True,), "no": (False,)}[args.compile]:
        for attention in ("softmax", "sparsemax") if args.attention == "both" else (args.attention,):
            for package, function in (("PyTorch", F.cross_entropy), ("torch_softmax_ext", tse.cross_entropy)):
                if compiled and args.compile == args.attention == "both" and attention == "sparsemax":
                    continue  # one compiled pair is enough
                if package == "PyTorch" and attention == "sparsemax" and args.attention == "both":
                    continue  # PyTorch has no sparsemax; the pair with softmax compares the losses
                name = f"{package}, {attention}{', compiled' if compiled else ''}"
                runs[name] = run(name, args, data, function, attention, compiled)
    headers = ["cross-entropy, attention", "training loss", "validation loss", "zeros in attention", "ms per step",
               "ms of the loss", "peak memory of the loss / logits"]  # fmt: skip
    print(tabulate([r["row"] for r in runs.values()], headers, floatfmt=("", ".4f", ".4f", ".1%", ".1f", ".2f", ".2f")))
    print("training loss: mean of the last 10 steps; times: medians; the loss: forward and backward to the logits")
    print("zeros in attention: among the weights that are not masked, on one window of the validation text")
    for name, result in runs.items():
        if result["alphas"]:
            shares = zeros(result["maps"])
            table = [
                [layer + 1, *(f"{a:.3f} ({share:.0%})" for a, share in zip(row, shares[layer], strict=True))]
                for layer, row in enumerate(result["alphas"])
            ]
            print(f"\n{name}: learned alphas, and zeros of the head")
            print(tabulate(table, ["layer", *(f"head {i + 1}" for i in range(shares.shape[1]))]))

    draw(runs, args.output)
    print(f"figure: {args.output}")


if __name__ == "__main__":
    main()
