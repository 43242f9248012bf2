"""A whole ResNet for 32x32 images as one Triton kernel: a program per image, from pixels to features.

Computing a block only for the images that keep it takes a gather, a few kernels and a wait for the host,
which cost more than the block. Here a program reads its image's policy on the device, and a dropped block
is a branch not taken: time follows the blocks that run, at any batch size.

Activations lie in the program's own scratch memory, channels last, with a border of zeros, so that a
convolution reads its neighbors without a mask: nine products of matrices, (pixels, channels in) by (channels
in, channels out), summed in fp32. Scratch and weights fit into a GPU's caches.
"""

import copy

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from models.resnet import FlatResNet32

PROGRAMS = 2  # per multiprocessor; 1 and 3 were slower on an H200
WARPS = 4  # per program; 8 were slower, and 4 without pipelined loads failed with an illegal access there
SCRATCH = 2 * (34 * 34 * 16 + 18 * 18 * 32 + 10 * 10 * 64)  # values per program: two activations a segment


@triton.jit
def _conv(
    acc, source, weight, H: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr, STRIDE: tl.constexpr
):
    """Add a 3x3 convolution of padded activations at `source` to acc (H * H, C_OUT)."""
    WIDTH: tl.constexpr = H * STRIDE + 2
    pixel, c_in, c_out = tl.arange(0, H * H), tl.arange(0, C_IN), tl.arange(0, C_OUT)
    corner = (pixel // H) * STRIDE * WIDTH + (pixel % H) * STRIDE
    for tap in tl.range(0, 9, num_stages=3):
        neighbor = corner + (tap // 3) * WIDTH + tap % 3
        x = tl.load(source + neighbor[:, None] * C_IN + c_in[None, :])
        w = tl.load(weight + tap * C_IN * C_OUT + c_in[:, None] * C_OUT + c_out[None, :])
        acc = tl.dot(x, w, acc)
    return acc


@triton.jit
def _bias(bias, H: tl.constexpr, C: tl.constexpr):
    return tl.zeros((H * H, C), tl.float32) + tl.load(bias + tl.arange(0, C))[None, :]


@triton.jit
def _inside(H: tl.constexpr, C: tl.constexpr):
    """Return where the values (H * H, C) lie inside padded activations."""
    pixel = tl.arange(0, H * H)
    return ((pixel // H + 1) * (H + 2) + pixel % H + 1)[:, None] * C + tl.arange(0, C)[None, :]


@triton.jit
def _write(target, at, values):
    """Store activations; what the program loads from now on is new."""
    tl.store(target + at, values.to(target.dtype.element_ty))
    tl.debug_barrier()


@triton.jit
def _same_shape(x, y, weight, bias, policy, first, last, H: tl.constexpr, C: tl.constexpr, ALL: tl.constexpr):
    """Run the blocks `first` to `last` of a segment that keep the shape, x to x by way of y."""
    inside = _inside(H, C)
    for block in range(first, last):
        keeps = True if ALL else tl.load(policy + block) != 0
        if keeps:
            branch = _conv(_bias(bias, H, C), x, weight, H, C, C, 1)
            _write(y, inside, tl.maximum(branch, 0))
            branch = _conv(_bias(bias + C, H, C), y, weight + 9 * C * C, H, C, C, 1)
            branch += tl.load(x + inside).to(tl.float32)
            tl.debug_barrier()
            _write(x, inside, tl.maximum(branch, 0))
        weight += 18 * C * C
        bias += 2 * C


@triton.jit
def _new_shape(source, x, y, weight, bias, policy, H: tl.constexpr, C: tl.constexpr, ALL: tl.constexpr):
    """Run a segment's first block, from C/2 channels of 2H x 2H pixels: its shortcut is `DownsampleB`."""
    C_IN: tl.constexpr = C // 2
    WIDTH: tl.constexpr = 2 * H + 2
    inside, pixel, channel = _inside(H, C), tl.arange(0, H * H), tl.arange(0, C)
    corner = ((pixel // H) * 2 + 1) * WIDTH + (pixel % H) * 2 + 1
    out = tl.zeros((H * H, C), tl.float32)
    for part in tl.static_range(4):
        neighbor = (corner + part // 2 * WIDTH + part % 2)[:, None] * C_IN + channel[None, :]
        out += tl.load(source + neighbor, mask=(channel < C_IN)[None, :], other=0.0).to(tl.float32)
    out = out / 4
    keeps = True if ALL else tl.load(policy) != 0
    if keeps:
        branch = _conv(_bias(bias, H, C), source, weight, H, C_IN, C, 2)
        _write(y, inside, tl.maximum(branch, 0))
        branch = _conv(_bias(bias + C, H, C), y, weight + 9 * C_IN * C, H, C, C, 1)
        out = tl.maximum(branch + out, 0)
    _write(x, inside, out)


@triton.jit
def _stem(image, weight, bias):
    """Return the first convolution (1024, 16) of an image (3, 32, 32)."""
    pixel, c_in, c_out = tl.arange(0, 1024), tl.arange(0, 16), tl.arange(0, 16)
    acc = _bias(bias, 32, 16)
    for tap in tl.range(0, 9, num_stages=1):
        r, c = pixel // 32 + tap // 3 - 1, pixel % 32 + tap % 3 - 1
        known = ((r >= 0) & (r < 32) & (c >= 0) & (c < 32))[:, None] & (c_in < 3)[None, :]
        x = tl.load(image + (r * 32 + c)[:, None] + c_in[None, :] * 1024, mask=known, other=0.0)
        w = tl.load(weight + tap * 256 + c_in[:, None] * 16 + c_out[None, :])
        acc = tl.dot(x.to(weight.dtype.element_ty), w, acc)
    return acc


@triton.jit
def _other_values(policy, num_blocks):
    """Return how many values of an image's policy are neither 0 nor 1."""
    found = 0
    for first in range(0, num_blocks, 64):
        block = first + tl.arange(0, 64)
        keeps = tl.load(policy + block, mask=block < num_blocks, other=0.0)
        found += tl.sum((keeps * (keeps - 1) != 0).to(tl.int32), 0)
    return found


# Counts are no constants of the compiled kernel: it serves every depth and batch.
@triton.jit(do_not_specialize=["num_images", "of_policy", "n1", "n2", "n3"])
def _resnet(
    images, policy, of_policy, features, scratch,
    stem_weight, stem_bias, weight1, bias1, weight2, bias2, weight3, bias3, num_images, n1, n2, n3,
    SIZE: tl.constexpr, ALL: tl.constexpr,
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
    num_blocks = n1 + n2 + n3
    images += program.to(tl.int64) * (3 * 32 * 32)
    policy += program.to(tl.int64) * of_policy
    features += program.to(tl.int64) * 64
    for _ in range(program, num_images, programs):
        stem = _stem(images, stem_weight, stem_bias)
        _write(x1, _inside(32, 16), tl.maximum(stem, 0))
        _same_shape(x1, y1, weight1, bias1, policy, 0, n1, 32, 16, ALL)
        _new_shape(x1, x2, y2, weight2, bias2, policy + n1, 16, 32, ALL)
        _same_shape(x2, y2, weight2 + 9 * 32 * 48, bias2 + 64, policy + n1, 1, n2, 16, 32, ALL)
        _new_shape(x2, x3, y3, weight3, bias3, policy + n1 + n2, 8, 64, ALL)
        _same_shape(x3, y3, weight3 + 9 * 64 * 96, bias3 + 128, policy + n1 + n2, 1, n3, 8, 64, ALL)
        mean = tl.sum(tl.load(x3 + _inside(8, 64)).to(tl.float32), 0) / 64
        if not ALL:
            mean = tl.where(_other_values(policy, num_blocks) == 0, mean, float("nan"))
        tl.store(features + tl.arange(0, 64), mean)
        tl.debug_barrier()
        images += programs.to(tl.int64) * (3 * 32 * 32)
        policy += programs.to(tl.int64) * of_policy
        features += programs * 64


def _taps(conv: torch.nn.Conv2d) -> Tensor:
    """Return a convolution's weights as (9, channels in, channels out)."""
    return conv.weight.permute(2, 3, 1, 0).flatten(0, 1)


class FusedResNet:
    """A folded `FlatResNet32` in fp16 or bf16, as one kernel; the sums, biases and logits are fp32.

    Runs on CUDA, and on the CPU in Triton's interpreter (TRITON_INTERPRET=1). Each call has scratch memory
    of its own, so that threads and CUDA graphs don't share any.
    ValueError for another network or type of numbers.
    """

    @torch.no_grad()
    def __init__(self, rnet: FlatResNet32, dtype: torch.dtype, device: torch.device | str):
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"the fused ResNet computes in float16 or bfloat16, not in {dtype}")
        if not isinstance(rnet, FlatResNet32) or rnet.conv1.bias is None:
            raise ValueError("the fused ResNet is made of a FlatResNet32 with its batch norms folded")
        self.dtype, self.layer_config, self.num_blocks = dtype, rnet.layer_config, rnet.num_blocks
        stem = F.pad(_taps(rnet.conv1), (0, 0, 0, 13))  # 16 channels in, as a product of matrices needs
        self.weights = [stem.to(device, dtype), rnet.conv1.bias.to(device, torch.float32)]
        for segment in rnet.blocks:
            convs = [conv for block in segment for conv in (block.conv1, block.conv2)]
            self.weights.append(torch.cat([_taps(conv).flatten() for conv in convs]).to(device, dtype))
            self.weights.append(torch.cat([conv.bias for conv in convs]).to(device, torch.float32))
        self.fc = copy.deepcopy(rnet.fc).to(device, torch.float32)
        self.device = self.weights[0].device
        self.programs = PROGRAMS
        if self.device.type == "cuda":
            self.programs *= torch.cuda.get_device_properties(self.device).multi_processor_count

    def __call__(self, images: Tensor, policy: Tensor | None = None) -> Tensor:
        """Return logits (N, classes) of images (N, 3, 32, 32), in any layout, under policies (N, K).

        Without a policy every block is kept. The host does not wait: a policy's values are read on the
        device, and others than 0 and 1 give logits that are not a number. ValueError for a wrong shape or
        device.
        """
        n = len(images)
        if images.shape[1:] != (3, 32, 32):
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (N, 3, 32, 32)")
        features = torch.empty(n, 64, device=images.device)
        if policy is not None:
            if policy.shape != (n, self.num_blocks):
                raise ValueError(f"policy has shape {tuple(policy.shape)}, expected {(n, self.num_blocks)}")
            policy = policy.to(torch.float32)  # (N, K) with rows that may be the same memory, as of expand
            policy = policy if policy.stride(1) == 1 else policy.contiguous()
        for tensor, name in ((images, "images are"), (policy, "policy is")):
            if tensor is not None and tensor.device != self.device:
                raise ValueError(f"the {name} on {tensor.device}, the network on {self.device}")
        programs = min(n, self.programs)
        if programs > 0:
            scratch = torch.empty(programs, SCRATCH, dtype=self.dtype, device=images.device)
            rows = features if policy is None else policy
            with torch.cuda.device_of(images):
                _resnet[(programs,)](
                    images.contiguous(), rows, rows.stride(0), features, scratch, *self.weights, n,
                    *self.layer_config, SIZE=SCRATCH, ALL=policy is None, num_warps=WARPS, num_stages=1,
                )  # fmt: skip
        return self.fc(features)
