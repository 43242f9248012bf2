"""A whole ResNet for 32x32 images as one Triton kernel: a program per image, from pixels to logits.

Computing a block only for the images that keep it takes a gather, a few kernels and a wait for the host,
which cost more than the block. Here a program reads its image's policy on the device, and a dropped block
is a branch not taken: time follows the blocks that run, at any batch size.

Activations lie in the program's own scratch memory, channels last, with a border of zeros, so that a
convolution reads its neighbors without a mask: nine products of matrices, (pixels, channels in) by (channels
in, channels out), summed in fp32. Scratch and weights fit into a GPU's caches.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from models.resnet import FlatResNet32

# The fastest of those tried on an H200. With 1 stage logits were wrong there, or an access illegal.
PROGRAMS = 2  # per multiprocessor
WARPS = 4  # per program
TILES = (512, 256, 64)  # pixels of a segment's activations that a program computes at once
STAGES = 4  # neighbors whose loads are under way at once
SCRATCH = 2 * (34 * 34 * 16 + 18 * 18 * 32 + 10 * 10 * 64)  # values per program: two activations a segment


@triton.jit
def _inside(first, H: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr):
    """Return where the values (TILE, C) of pixels from `first` on lie inside padded activations."""
    pixel = first + tl.arange(0, TILE)
    return ((pixel // H + 1) * (H + 2) + pixel % H + 1)[:, None] * C + tl.arange(0, C)[None, :]


@triton.jit
def _conv(
    source, target, weight, bias, adds,
    H: tl.constexpr, C_IN: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write a 3x3 convolution's ReLU, C channels of H x H pixels; `adds`: the target's values come on top."""
    WIDTH: tl.constexpr = H * STRIDE + 2
    c_in, c_out = tl.arange(0, C_IN), tl.arange(0, C)
    for tile in tl.range(0, H * H, TILE, loop_unroll_factor=1):
        pixel = tile + tl.arange(0, TILE)
        corner = (pixel // H) * STRIDE * WIDTH + (pixel % H) * STRIDE
        out = tl.zeros((TILE, C), tl.float32) + tl.load(bias + c_out)[None, :]
        for tap in tl.range(0, 9, num_stages=STAGES):
            neighbor = corner + (tap // 3) * WIDTH + tap % 3
            x = tl.load(source + neighbor[:, None] * C_IN + c_in[None, :])
            w = tl.load(weight + tap * C_IN * C + c_in[:, None] * C + c_out[None, :])
            out = tl.dot(x, w, out)
        inside = _inside(tile, H, C, TILE)
        out += tl.load(target + inside, mask=adds, other=0.0).to(tl.float32)
        tl.debug_barrier()
        tl.store(target + inside, tl.maximum(out, 0).to(target.dtype.element_ty))
    tl.debug_barrier()  # what the program loads from now on is new


@triton.jit
def _same_shape(
    x, y, weight, bias, policy, first, last,
    H: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Run the blocks `first` to `last` of a segment that keep the shape, x to x by way of y."""
    for block in range(first, last):
        keeps = True if ALL else tl.load(policy + block) != 0
        if keeps:
            for half in tl.range(0, 2, loop_unroll_factor=1):
                at = half * 9 * C * C
                _conv(x, y, weight + at, bias + half * C, half == 1, H, C, C, 1, TILE, STAGES)
                x, y = y, x
        weight += 18 * C * C
        bias += 2 * C


@triton.jit
def _new_shape(
    source, x, y, weight, bias, policy,
    H: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Run a segment's first block, from C/2 channels of 2H x 2H pixels: its shortcut is `DownsampleB`."""
    C_IN: tl.constexpr = C // 2
    WIDTH: tl.constexpr = 2 * H + 2
    channel = tl.arange(0, C)
    for tile in tl.range(0, H * H, TILE, loop_unroll_factor=1):
        pixel = tile + tl.arange(0, TILE)
        corner = ((pixel // H) * 2 + 1) * WIDTH + (pixel % H) * 2 + 1
        out = tl.zeros((TILE, C), tl.float32)
        for part in tl.static_range(4):
            neighbor = (corner + part // 2 * WIDTH + part % 2)[:, None] * C_IN + channel[None, :]
            out += tl.load(source + neighbor, mask=(channel < C_IN)[None, :], other=0.0).to(tl.float32)
        tl.store(x + _inside(tile, H, C, TILE), (out / 4).to(x.dtype.element_ty))
    tl.debug_barrier()
    keeps = True if ALL else tl.load(policy) != 0
    if keeps:
        _conv(source, y, weight, bias, False, H, C_IN, C, 2, TILE, STAGES)
        _conv(y, x, weight + 9 * C_IN * C, bias + C, True, H, C, C, 1, TILE, STAGES)


@triton.jit
def _other_values(policy, num_blocks):
    """Return how many values of an image's policy are neither 0 nor 1."""
    found = 0
    for first in range(0, num_blocks, 64):
        block = first + tl.arange(0, 64)
        keeps = tl.load(policy + block, mask=block < num_blocks, other=0.0)
        found += tl.sum((keeps * (keeps - 1) != 0).to(tl.int32), 0)
    return found


# These are no constants of the compiled kernel: it serves every depth and batch, and both networks.
@triton.jit(do_not_specialize=["num_images", "of_policy", "n1", "n2", "n3", "num_outputs", "decides"])
def _resnet(
    images, policy, of_policy, outputs, scratch,
    stem_weight, stem_bias, weight1, bias1, weight2, bias2, weight3, bias3, last_weight, last_bias,
    num_images, n1, n2, n3, num_outputs, decides,
    SIZE: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr, STAGES: tl.constexpr,
    ALL: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    x1 = scratch + program.to(tl.int64) * SIZE
    y1 = x1 + 34 * 34 * 16
    x2 = y1 + 34 * 34 * 16
    y2 = x2 + 18 * 18 * 32
    x3 = y2 + 18 * 18 * 32
    y3 = x3 + 10 * 10 * 64
    for first in range(0, SIZE, 1024):  # the borders stay 0, the rest is written before it is read
        at = first + tl.arange(0, 1024)
        tl.store(x1 + at, tl.zeros((1024,), scratch.dtype.element_ty), mask=at < SIZE)
    tl.debug_barrier()
    color, channel = tl.arange(0, 16), tl.arange(0, 64)
    images += program.to(tl.int64) * (3 * 32 * 32)
    policy += program.to(tl.int64) * of_policy
    outputs += program.to(tl.int64) * num_outputs
    for _ in range(program, num_images, programs):
        for tile in tl.range(0, 32 * 32, T1, loop_unroll_factor=1):
            pixel = (tile + tl.arange(0, T1))[:, None]
            values = tl.load(images + pixel + color[None, :] * 1024, mask=(color < 3)[None, :], other=0.0)
            tl.store(y1 + _inside(tile, 32, 16, T1), values.to(scratch.dtype.element_ty))
        tl.debug_barrier()
        _conv(y1, x1, stem_weight, stem_bias, False, 32, 16, 16, 1, T1, STAGES)
        _same_shape(x1, y1, weight1, bias1, policy, 0, n1, 32, 16, T1, STAGES, ALL)
        policy2, policy3 = policy + n1, policy + n1 + n2
        _new_shape(x1, x2, y2, weight2, bias2, policy2, 16, 32, T2, STAGES, ALL)
        _same_shape(x2, y2, weight2 + 9 * 32 * 48, bias2 + 64, policy2, 1, n2, 16, 32, T2, STAGES, ALL)
        _new_shape(x2, x3, y3, weight3, bias3, policy3, 8, 64, T3, STAGES, ALL)
        _same_shape(x3, y3, weight3 + 9 * 64 * 96, bias3 + 128, policy3, 1, n3, 8, 64, T3, STAGES, ALL)
        mean = tl.sum(tl.load(x3 + _inside(0, 8, 64, 64)).to(tl.float32), 0) / 64
        if not ALL:
            mean = tl.where(_other_values(policy, n1 + n2 + n3) == 0, mean, float("nan"))
        for first in range(0, num_outputs, 64):
            out = first + tl.arange(0, 64)
            known = out < num_outputs
            w = tl.load(last_weight + out[:, None] * 64 + channel[None, :], mask=known[:, None], other=0.0)
            bias = tl.load(last_bias + out, mask=known, other=0.0)
            logit = tl.sum(w * mean[None, :], 1) + bias
            output = tl.where(decides != 0, (logit >= 0).to(tl.float32), logit)
            tl.store(outputs + out, output, mask=known)
        tl.debug_barrier()
        images += programs.to(tl.int64) * (3 * 32 * 32)
        policy += programs.to(tl.int64) * of_policy
        outputs += programs.to(tl.int64) * num_outputs


def _taps(conv: nn.Conv2d) -> Tensor:
    """Return a convolution's weights as (9, channels in, channels out); a product of matrices needs 16 in."""
    taps = conv.weight.permute(2, 3, 1, 0).flatten(0, 1)
    return F.pad(taps, (0, 0, 0, max(16 - conv.in_channels, 0)))


class FusedResNet:
    """A folded `FlatResNet32` in fp16 or bf16, as one kernel; sums, biases and the last layer are in fp32.

    `last`: a layer in place of `rnet.fc`. Runs on CUDA, and on the CPU in Triton's interpreter
    (TRITON_INTERPRET=1). Each call has scratch memory of its own, so that threads and CUDA graphs don't share
    any. ValueError for another network or type of numbers.
    """

    @torch.no_grad()
    def __init__(
        self,
        rnet: FlatResNet32,
        dtype: torch.dtype,
        device: torch.device | str,
        last: nn.Linear | None = None,
    ):
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"the fused ResNet computes in float16 or bfloat16, not in {dtype}")
        if not isinstance(rnet, FlatResNet32) or rnet.conv1.bias is None:
            raise ValueError("the fused ResNet is made of a FlatResNet32 with its batch norms folded")
        self.dtype, self.layer_config, self.num_blocks = dtype, rnet.layer_config, rnet.num_blocks
        self.weights = []  # and biases, by turns: of the stem, the segments and the last layer
        for part in (rnet.conv1, *rnet.blocks):
            convs = [module for module in part.modules() if isinstance(module, nn.Conv2d)]
            self.weights.append(torch.cat([_taps(conv).flatten() for conv in convs]).to(device, dtype))
            self.weights.append(torch.cat([conv.bias for conv in convs]).to(device, torch.float32))
        last = rnet.fc if last is None else last
        self.num_outputs = last.out_features
        self.weights += [last.weight.to(device, torch.float32), last.bias.to(device, torch.float32)]
        self.device = self.weights[0].device
        self.programs = PROGRAMS
        if self.device.type == "cuda":
            self.programs *= torch.cuda.get_device_properties(self.device).multi_processor_count

    def decide(self, images: Tensor) -> Tensor:
        """Return policies (N, outputs) for images (N, 3, 32, 32): 1 where a logit is at least 0, else 0."""
        return self(images, decides=True)

    def __call__(self, images: Tensor, policy: Tensor | None = None, decides: bool = False) -> Tensor:
        """Return logits (N, outputs) of images (N, 3, 32, 32), in any layout, under policies (N, K).

        Without a policy every block is kept. The host does not wait: a policy's values are read on the
        device, and others than 0 and 1 give logits that are not a number. `decides`: see `decide`.
        ValueError for a wrong shape or device.
        """
        n = len(images)
        if images.shape[1:] != (3, 32, 32):
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (N, 3, 32, 32)")
        if policy is not None:
            if policy.shape != (n, self.num_blocks):
                raise ValueError(f"policy has shape {tuple(policy.shape)}, expected {(n, self.num_blocks)}")
            policy = policy.to(torch.float32)  # (N, K) with rows that may be the same memory, as of expand
            policy = policy if policy.stride(1) == 1 else policy.contiguous()
        for tensor, name in ((images, "images are"), (policy, "policy is")):
            if tensor is not None and tensor.device != self.device:
                raise ValueError(f"the {name} on {tensor.device}, the network on {self.device}")
        outputs = torch.empty(n, self.num_outputs, device=images.device)
        programs = min(n, self.programs)
        if programs > 0:
            scratch = torch.empty(programs, SCRATCH, dtype=self.dtype, device=images.device)
            rows = outputs if policy is None else policy
            with torch.cuda.device_of(images):
                _resnet[(programs,)](
                    images.contiguous(), rows, rows.stride(0), outputs, scratch, *self.weights, n,
                    *self.layer_config, self.num_outputs, int(decides), SCRATCH, *TILES, STAGES,
                    ALL=policy is None, num_warps=WARPS, num_stages=1,
                )  # fmt: skip
        return outputs
