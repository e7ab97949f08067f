"""Train a model on several processes: `torchrun --nproc-per-node 2 examples/train_ddp.py --help`.

Every process has a share of the samples. A checkpoint holds what a run needs to go on: the model, the optimizer, and what was learnt about samples
(`approx_compile.state_dict`). With `--resume` the run goes on from it. With `--reduce` layers are sampled with `topk_weights`, and only the slices of the
gradients that the processes compute are exchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import data
import models
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch.nn.parallel import DistributedDataParallel as DDP

import approx_compile
import approx_compile.distributed
from approx_compile import ApproxConfig

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(data.NAMES)}.")] = "digits",
    directory: Annotated[Path | None, typer.Option("--data", metavar="DIR", help="Where the data set's files are (not for digits).")] = None,
    model: Annotated[str, typer.Option(help=f"One of {models.VALID}.")] = "mlp",
    width: Annotated[int | None, typer.Option(min=1, help="Hidden units of mlp, channels of the first stage of the others.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training samples, those of a resumed run included.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of one process in a step.")] = 128,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 1e-3,
    reduce: Annotated[bool, typer.Option(help="Sample with topk_weights, and exchange the kept slices of gradients only.")] = False,
    ratio: Annotated[float, typer.Option(help="Share of the channels that is kept with --reduce.")] = 0.5,
    checkpoint: Annotated[Path, typer.Option(metavar="FILE", help="Written after every epoch.")] = Path("out/train_ddp.pt"),
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint.")] = False,
) -> None:
    options: dict[str, Any] = {"policy": "always", "method": "topk_weights", "ratio": ratio} if reduce else {"adaptive": {"agree": True}}
    try:
        ApproxConfig.of(options)
        full = data.load(dataset, directory)
        torch.manual_seed(0)  # the same weights everywhere
        net = models.build(model, full.shape, full.classes, width)
        if resume and not checkpoint.exists():
            raise ValueError(f"--resume: there is no {checkpoint}; train without --resume first, or name another file with --checkpoint")
    except ValueError as e:  # DataError and ConfigError are ValueErrors
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(2) from None
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    first = 0
    if resume:  # before DDP, which sends rank 0's weights to all
        saved = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        approx_compile.load_state_dict(net, saved["approx"])
        first = saved["epoch"]
    ddp = DDP(torch.compile(net, backend="approx", options=options))  # compiled inside: Dynamo compiles nothing of DDP(nn.Sequential(...))
    exchange = approx_compile.distributed.register(ddp, verify=2)
    steps = len(full.train_x) // (world * batch_size)
    if steps < 1:
        raise typer.BadParameter(f"got {batch_size}; {world} processes have {len(full.train_x)} samples together", param_hint="--batch-size")
    for epoch in range(first, epochs):
        net.train()
        order = torch.randperm(len(full.train_x), generator=torch.Generator().manual_seed(epoch))[rank::world]  # the same order in a resumed run
        for batch in order.split(batch_size)[:steps]:
            optimizer.zero_grad()
            loss = F.cross_entropy(ddp(full.train_x[batch]), full.train_y[batch])
            loss.backward()
            optimizer.step()
        if rank == 0:
            correct = _accuracy(net, full)
            print(f"epoch {epoch + 1}: loss {loss.item():.3f} on rank 0, test accuracy {correct:.2%}", flush=True)
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "approx": approx_compile.state_dict(net), "epoch": epoch + 1}
            torch.save(state, checkpoint)
        dist.barrier()
    if rank == 0:
        print(approx_compile.decisions(net))
        if exchange.exchanges:
            sent, whole = exchange.bytes_sent / exchange.exchanges / 1e6, exchange.bytes_whole / exchange.exchanges / 1e6
            print(f"exchanged per step: {sent:.2f} MB of {whole:.2f} MB of gradients")
        print(f"Written: {checkpoint}")
    dist.destroy_process_group()


def _accuracy(net: torch.nn.Module, full: data.Dataset) -> float:
    net.eval()
    with torch.no_grad():
        return float((net(full.test_x).argmax(1) == full.test_y).float().mean())


if __name__ == "__main__":
    app()
