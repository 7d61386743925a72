"""What the compiled CUDA kernels need, against a budget: no spills, 16-byte accesses, few launches."""

from __future__ import annotations

import pytest

from bench import cuda_resources, kernel_estimates, kernel_resources
from kfo_ext import _plan
from kfo_ext.ops.library import CUDA_LIBRARY
from kfo_ext.problems import Problems
from kfo_ext.testing import CASES, LARGE_CASES, model_case

ORDER_KERNELS = ("forward_kernel", "backward_kernel", "double_backward_kernel")
# Launched two by two: sums over chunks of rows, then what is elementwise.
BATCH_NORM_ORDERS = ("batch_norm_forward_kernel", "batch_norm_backward_kernel", "batch_norm_double_backward_kernel")
BATCH_NORM_SUMS = (
    "batch_norm_statistics_kernel", "batch_norm_backward_sums_kernel", "batch_norm_double_backward_sums_kernel",
)  # fmt: skip
# Of conv2d and conv2d_input; of conv2d_weight, whose sums over splits are a launch of their own.
CONVOLUTIONS = ("convolution_kernel", "convolution_weight_kernel")
# Registers of a thread: with 128 four blocks of 128 threads fit on a multiprocessor, with 168 three, with 255 two.
REGISTERS = {
    **dict.fromkeys(ORDER_KERNELS, 128),
    **dict.fromkeys(BATCH_NORM_ORDERS + BATCH_NORM_SUMS + CONVOLUTIONS, 128),
    "double_backward_kernel": 168,
    "sum_kernel": 40,
    "batch_norm_task_sum_kernel": 40,
    "convolution_weight_sum_kernel": 40,
    "tiled_kernel": 255,
}
REGISTERS_OF = {
    **{(kernel, "float64"): 168 for kernel in ORDER_KERNELS},
    **{(kernel, "float64"): 255 for kernel in CONVOLUTIONS},
}
SHARED_BYTES = 96 * 1024
# Images, height, width, in and out channels, kernel height and width, stride, padding.
CONVOLUTION_CASES = {
    "omniglot_first": (25, 28, 28, 1, 32, 3, 3, 2, 1),
    "omniglot": (25, 14, 14, 32, 32, 3, 3, 2, 1),
    "cifar": (25, 32, 32, 32, 32, 3, 3, 1, 1),
    "most_weights_in_shared_memory": (500, 32, 32, 14, 32, 6, 6, 1, 1),
    "wide": (25, 32, 32, 512, 512, 3, 3, 1, 1),
    "one_pixel": (1, 1, 1, 1, 1, 1, 1, 1, 0),
}


@pytest.fixture(scope="module")
def rows():
    if not CUDA_LIBRARY.exists():
        pytest.skip("the CUDA library is not built: no nvcc")
    if cuda_resources.cuobjdump() is None:
        pytest.skip("triton, whose cuobjdump reads the library, is not installed")
    return cuda_resources.rows()


def test_every_kernel_is_there_for_every_architecture(rows):
    built = {(row.kernel, row.dtype, row.arch) for row in rows}
    architectures = [name for name in _plan.build_info()["architectures"] if name.startswith("sm_")]
    assert built == {
        (kernel, dtype, arch) for kernel in REGISTERS for dtype in ("float32", "float64") for arch in architectures
    }


def test_no_kernel_spills_or_exceeds_its_registers(rows):
    for row in rows:
        assert not cuda_resources.spills(row._asdict()), row
        exceptions = (REGISTERS_OF.get((row.kernel, kind), 0) for kind in (row.arch, row.dtype))
        assert row.registers <= max(REGISTERS[row.kernel], *exceptions), row


def test_asynchronous_copies_are_committed(rows):
    for row in rows:
        assert bool(row.copies) == bool(row.commits) == (row.kernel in ORDER_KERNELS + CONVOLUTIONS), row


def test_the_orders_start_their_copies_early_and_divide_nowhere(rows):
    for row in rows:
        if row.kernel in (*ORDER_KERNELS, "sum_kernel"):
            assert row.reciprocals == 0, row
            assert row.before_copies <= 220, row


def test_the_orders_move_16_bytes_at_a_time(rows):
    for row in rows:
        if row.kernel in ORDER_KERNELS:
            assert row.copies_16_byte and row.stores_16_byte, row
        if row.kernel in BATCH_NORM_ORDERS:
            assert row.loads_16_byte and row.stores_16_byte, row
        if row.kernel in BATCH_NORM_SUMS:
            assert row.loads_16_byte, row


def test_convolutions_multiply_in_their_inner_loop(rows):
    for row in rows:
        if row.kernel in CONVOLUTIONS:
            assert row.copies_16_byte and row.stores_16_byte and row.shared_loads_16_byte, row
        if row.kernel in CONVOLUTIONS and row.dtype == "float32":
            # The rest are 16-byte loads of operands from shared memory, and the loop itself.
            assert row.loop_multiply_adds >= max(128, 0.75 * row.loop), row


def test_three_blocks_of_a_convolution_and_more_are_resident_at_once(rows):
    gpu = kernel_resources.Gpu()
    registers = {row.kernel: row.registers for row in rows if (row.dtype, row.arch) == ("float32", gpu.arch)}
    found = kernel_resources.convolution_estimates(registers, gpu)
    assert {row["operator"] for row in found} == set(kernel_resources.OPERATORS)
    for row in found:
        assert row["resident_blocks"] >= 3, row


@pytest.mark.parametrize("case", CONVOLUTION_CASES)
@pytest.mark.parametrize("element_size", [4, 8])
def test_no_convolution_asks_for_more_shared_memory_than_every_gpu_has(case, element_size):
    launches = _plan.cuda_conv2d_launches(CONVOLUTION_CASES[case], 16, element_size)
    assert [[kernel for kernel, _, _ in order] for order in launches] == [
        ["convolution_kernel"], ["convolution_kernel"], ["convolution_weight_kernel", "convolution_weight_sum_kernel"],
    ]  # fmt: skip
    for _, blocks, shared_bytes in (launch for order in launches for launch in order):
        assert 0 < blocks < 2**31
        assert 0 < shared_bytes <= SHARED_BYTES


def test_batch_norm_loads_the_next_rows_before_it_uses_these(rows):
    """The first rows and, in the loop, the next: four loads each of one or two operands, six of three."""
    together = {"statistics": 16, "forward": 8, "backward": 8, "backward_sums": 8}
    for row in rows:
        if row.kernel in BATCH_NORM_ORDERS + BATCH_NORM_SUMS:
            name = row.kernel.removeprefix("batch_norm_").removesuffix("_kernel")
            # With ddx and without.
            assert row.loads_together >= together.get(name, 20), row


def test_loads_end_a_group_where_one_of_them_is_read():
    code = [
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "@P0 LDG.E.128 R8, desc[UR4][R2.64+0x10]",
        "IADD3 R5, R2, R3, RZ",  # overwrites, reads neither
        "FADD R12, R1, R11",
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "LDG.E R20, desc[UR4][R2.64]",
        "STG.E.128 desc[UR4][R2.64], R4",
        "LDG.E.128 R8, desc[UR4][R2.64]",
    ]
    body = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;  /* 0x0 */" for i, line in enumerate(code))
    assert cuda_resources.load_groups(body) == [2, 1, 1]


@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_network_takes_one_launch_and_one_for_the_sums(layers, order):
    launches = _plan.cuda_launches(Problems(model_case(layers)).flat, 16, order, 4)
    assert [kernel for kernel, _, _ in launches] == [ORDER_KERNELS[order - 1]] + ["sum_kernel"] * (order > 1)
    # Of the double backward three blocks on a multiprocessor, as its registers allow.
    most = SHARED_BYTES // 2 if order < 3 else 2 * SHARED_BYTES // 3
    assert all(shared_bytes <= most for _, _, shared_bytes in launches)


@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES])
@pytest.mark.parametrize("element_size", [4, 8])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_no_launch_asks_for_more_shared_memory_than_every_gpu_has(case, element_size, order):
    shapes = Problems((CASES | LARGE_CASES)[case]).flat
    for shared in (False, True):
        launches = _plan.cuda_launches(shapes, 3, order, element_size, shared_R=shared, shared_L=shared)
        assert launches
        assert all(shared_bytes <= SHARED_BYTES for _, _, shared_bytes in launches)


@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES])
@pytest.mark.parametrize("tasks", [1, 16])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_scratch_memory_stays_below_operands_and_outputs(case, tasks, order):
    shapes = Problems((CASES | LARGE_CASES)[case]).flat
    for shared in (False, True):
        scratch = _plan.cuda_scratch(shapes, tasks, order, 4, shared_R=shared, shared_L=shared)
        assert scratch <= _plan.bytes(shapes, tasks, order, 1 if shared else tasks, 4) + 1024
        assert order > 1 or case in LARGE_CASES or scratch == 0


@pytest.mark.parametrize(
    ("p", "q", "element_size", "by_lanes"),
    [(32, 9, 4, True), (16, 6, 4, True), (15, 9, 4, False), (33, 9, 4, False), (32, 10, 4, False), (32, 9, 8, False)],
)
def test_sizes_decide_whether_a_warp_computes_each_matrix(p, q, element_size, by_lanes):
    for order in (1, 2, 3):
        [(found_p, found_q, n, chunks, found, tiles)] = _plan.cuda_cuts([40, p, q], 16, order, element_size)
        assert (found_p, found_q, found) == (p, q, by_lanes)
        assert n == -(-40 // chunks) and len(tiles) == 4


def test_short_sums_are_shared_by_threads():
    [(_, _, n, _, _, tiles)] = _plan.cuda_cuts([32, 1, 9], 1, 2, 8)
    assert n == 32
    assert tiles[2] == (1, 32)  # dR, one element
    assert tiles[3][1] > 1  # dL, 81


def test_an_estimate_is_never_below_what_bounds_it():
    machine = kernel_estimates.Machine()
    kernels = dict.fromkeys((*ORDER_KERNELS, "tiled_kernel"), 128)
    for row in kernel_resources.estimates(kernels, kernels, kernel_resources.Gpu()):
        assert row["estimate_us"] > row["launches"] * machine.node_us
        assert row["estimate_us"] > row["MB"] * 1e6 / machine.bytes_per_us


def test_the_cost_of_one_multiply_add():
    machine = kernel_estimates.Machine()
    cost = kernel_estimates.block_cost("forward", 1, 1, 1, [(1, 1)] * 4, machine)
    assert cost == (2 * (machine.job_cycles + kernel_estimates.STEP[1]), 2 * kernel_estimates.STEP[1], 4)


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match="at least as large as the kernel"):
        _plan.cuda_conv2d_launches((1, 2, 2, 1, 1, 3, 3, 1, 0), 1, 4)
    with pytest.raises(ValueError, match="at most 2147483392 pixels of x for each task"):
        _plan.cuda_conv2d_launches((2**21, 32, 32, 1, 1, 3, 3, 1, 0), 1, 4)
    with pytest.raises(ValueError, match="element_size: expected 4 or 8, got 2"):
        _plan.cuda_launches([1, 1, 1], 1, 1, 2)
    with pytest.raises(ValueError, match="tasks: expected at least 0, got -1"):
        _plan.cuda_launches([1, 1, 1], -1, 1, 4)
