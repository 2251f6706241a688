"""Bytes that compiled programs move, against counts by hand."""
import jax
import jax.numpy as jnp
import pytest
from jax import P

from mtp_jax.config import MeshConfig
from mtp_jax.measure import traffic
from mtp_jax.measure.hlo import first_group
from mtp_jax.mesh import make_mesh

MESH = MeshConfig(data=2, fsdp=4)


def collectives(local, shape, in_specs, out_specs) -> dict:
  """{(kind, mesh axes): bytes that each of eight devices sends} of a compiled program."""
  mesh = make_mesh(MESH)
  with jax.set_mesh(mesh):
    run = jax.jit(jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False))
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, in_specs))
    hlo = run.lower(x).compile().as_text()
  return {(collective.kind, traffic.axes(collective.group, dict(mesh.shape))): collective.sent_bytes
          for collective in traffic.traffic(hlo).collectives}


def moved_bytes(function, *shapes) -> float:
  """Bytes of memory that a compiled program of float32 arrays moves."""
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return traffic.traffic(jax.jit(function).lower(*arguments).compile().as_text()).memory_bytes


def loops(local):
  """Runs it 5 x 3 times in two nested loops; each run needs the result of the one before."""
  inner = lambda x: jax.lax.fori_loop(0, 3, lambda _, x: local(x), x)
  return lambda x: jax.lax.scan(lambda x, _: (inner(x), None), x, length=5)[0]


@pytest.mark.parametrize('axes', [('data',), ('fsdp',), ('data', 'fsdp')], ids=str)
def test_a_sum_over_devices_sends_twice_what_they_hold_as_often_as_the_loops_run(axes):
  size, members = 4 * 16 * 8, {('data',): 2, ('fsdp',): 4, ('data', 'fsdp'): 8}[axes]
  sent = collectives(loops(lambda x: jnp.tanh(jax.lax.psum(x, axes))), (16, 8), P(), P())
  assert sent == {('all-reduce', axes): pytest.approx(15 * 2 * size * (members - 1) / members)}


def test_shards_that_are_gathered_are_sent_to_all_others():
  gather = lambda x: jnp.tanh(jax.lax.all_gather(x, 'fsdp', tiled=True)[:4])
  sent = collectives(loops(gather), (16, 8), P('fsdp'), P('fsdp'))
  assert sent == {('all-gather', ('fsdp',)): 15 * (4 * 4 * 8) * 3}


def test_a_sum_of_which_each_keeps_its_shard_sends_half_of_a_whole_sum():
  scatter = lambda x: jax.lax.psum_scatter(x, 'fsdp', tiled=True)
  sent = collectives(scatter, (16, 8), P(), P('fsdp'))
  assert sent == {('reduce-scatter', ('fsdp',)): 4 * 16 * 8 * 3 / 4}


def test_a_neighbour_is_sent_the_whole():
  ring = [(i, (i + 1) % 4) for i in range(4)]
  sent = collectives(lambda x: jax.lax.ppermute(x, 'fsdp', ring), (16, 8), P('fsdp'), P('fsdp'))
  assert sent == {('collective-permute', ('fsdp',)): 4 * 4 * 8}


def test_a_loop_through_a_stack_reads_one_slice_of_it_at_a_time():
  """Twenty matrices of 1 MiB: read once they are 20 MiB; read whole each time, 400."""
  run = lambda stack, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]
  assert 20 * 2**20 <= moved_bytes(run, (20, 512, 512), (8, 512)) < 70 * 2**20


def test_a_loop_that_fills_a_stack_writes_one_slice_of_it_at_a_time():
  """50 slices of 1 MiB; 50 writes of the whole would be 2,500 MiB."""
  run = lambda x: jax.lax.scan(lambda x, _: (x + 1, x * 2), x, length=50)[1]
  assert 50 * 2**20 <= moved_bytes(run, (2**18,)) < 500 * 2**20


def test_a_conditional_counts_as_the_branch_that_moves_most():
  """One branch goes through 40 MiB, the other through nothing; their order does not matter."""
  walk = lambda x: jax.lax.fori_loop(0, 20, lambda _, x: jnp.tanh(x), x)
  stay = lambda x: x
  first = moved_bytes(lambda i, x: jax.lax.cond(i[0] > 0, walk, stay, x), (1,), (2**18,))
  second = moved_bytes(lambda i, x: jax.lax.cond(i[0] > 0, stay, walk, x), (1,), (2**18,))
  assert first == second and 40 * 2**20 <= first < 60 * 2**20


@pytest.mark.parametrize('text, group', [
    ('replica_groups={{0,2,4,6},{1,3,5,7}}', (0, 2, 4, 6)),
    ('replica_groups=[2,4]<=[8]', (0, 1, 2, 3)),
    ('replica_groups=[2,4]<=[4,2]T(1,0)', (0, 2, 4, 6)),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_2'}", (0, 1)),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}", (0, 2, 4, 6)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_0'}", (0, 1)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([4]) {'axis_1'}", (0, 1)),
    ('source_target_pairs={{0,2},{2,4},{4,6},{6,0}}', (0, 2)),
    ('source_target_pairs={{0,0},{2,1},{1,2},{3,3}}', (2, 1))])
def test_a_group_is_read_however_a_module_writes_it(text, group):
  assert first_group(f'%x), channel_id=1, {text}, use_global_device_ids=true') == group


TPU = '''HloModule step, num_partitions=4

%scatter (input: f32[8,16]) -> f32[2,16] {
  %input = f32[8,16]{1,0} parameter(0)
  %all-reduce.1 = f32[8,16]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}, \
to_apply=%add
  %at = s32[] constant(0)
  ROOT %kept = f32[2,16]{1,0} dynamic-slice(%all-reduce.1, %at, %at), dynamic_slice_sizes={2,16}
}

%body (state: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %state = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,16]{1,0:T(8,128)S(1)} get-tuple-element(%state), index=1
  %mine = f32[2,16]{1,0} fusion(%x), kind=kCustom, calls=%scatter
  %sent = (f32[2,16]{1,0}, u32[], token[]) send(%mine, %token), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %next = (s32[], f32[8,16]{1,0}) tuple(%i, %x)
}

%condition (state.1: (s32[], f32[8,16])) -> pred[] {
  %state.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %first = s32[] constant(0)
  %bound = s32[]{:T(128)} constant(7), metadata={op_name="cond/lt"}
  ROOT %lt = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (argument: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %argument = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %while.1 = (s32[], /*index=1*/f32[8,16]{1,0}) while(%argument), condition=%condition, \
body=%body
}
'''


def test_a_tpus_module_has_bounds_in_conditions_scatters_in_fusions_and_sends_between_slices():
  """Seven times: a chip sends 3/4 of 512 bytes in its slice, and 128 bytes to the other slice."""
  moved, mesh = traffic.traffic(TPU, slices=2), {'data': 2, 'fsdp': 4}
  assert moved.collectives == (traffic.Collective('all-reduce', (0, 4), 7 * 2 * 128 / 2),
                               traffic.Collective('reduce-scatter', (0, 1, 2, 3), 7 * 384))
  assert traffic.axes((0, 4), mesh) == ('data',) and traffic.axes((0, 1, 2, 3), mesh) == ('fsdp',)
  # The fusion reads the chip's own memory, which does not count, and writes 128; the send copies.
  assert moved.memory_bytes == 7 * (128 + 128 + 128 + 4)


def test_a_loop_without_a_bound_is_an_error():
  hlo = TPU.replace('s32[] constant(0)\n  %bound', 's32[] parameter(1)\n  %bound')
  with pytest.raises(ValueError, match='while.1: how often it runs is not in the compiled module'):
    traffic.traffic(hlo.replace('constant(7)', 'parameter(2)'), slices=2)


def test_a_group_that_is_written_in_another_way_is_an_error_rather_than_nothing():
  line = 'a collective whose devices are written in an unknown way: .*replica_groups=all'
  with pytest.raises(ValueError, match=line):
    traffic.traffic(TPU.replace('replica_groups={{0,1,2,3}}', 'replica_groups=all'), slices=2)


CHAIN = """HloModule step, num_partitions=4

%start (shard: bf16[2,8]) -> (bf16[2,8], bf16[8,8], u32[]) {
  %shard = bf16[2,8]{1,0} parameter(0)
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%shard), channel_id=5, replica_groups={{0,1,2,3}}, \
dimensions={0}, \
frontend_attributes={chain_id="0"}
  ROOT %begun = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%beside (shard.1: bf16[2,8], whole.1: bf16[8,8], x: f32[4]) -> (f32[4], bf16[2,8], bf16[8,8], \
bf16[8,8]) {
  %shard.1 = bf16[2,8]{1,0} parameter(0)
  %whole.1 = bf16[8,8]{1,0} parameter(1)
  %x = f32[4]{0} parameter(2)
  %y = f32[4]{0} negate(%x)
  %all-gather.2 = bf16[8,8]{1,0} all-gather(%shard.1), channel_id=5, replica_groups={{0,1,2,3}}, \
dimensions={0}, \
frontend_attributes={chain_id="0"}
  ROOT %both = (f32[4]{0}, bf16[2,8]{1,0}, bf16[8,8]{1,0}, bf16[8,8]{1,0}) tuple(%y, %shard.1, \
%whole.1, %all-gather.2)
}

%done (shard.2: bf16[2,8], whole.2: bf16[8,8]) -> bf16[8,8] {
  %shard.2 = bf16[2,8]{1,0} parameter(0)
  %whole.2 = bf16[8,8]{1,0} parameter(1)
  %all-gather.3 = bf16[8,8]{1,0} all-gather(%shard.2), channel_id=5, replica_groups={{0,1,2,3}}, \
dimensions={0}, \
frontend_attributes={chain_id="0"}
  ROOT %ended = bf16[8,8]{1,0} custom-call(%shard.2, %whole.2, %all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (mine: bf16[2,8], v: f32[4]) -> bf16[8,8] {
  %mine = bf16[2,8]{1,0} parameter(0)
  %v = f32[4]{0} parameter(1)
  %a = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, u32[]{:S(2)}) fusion(%mine), kind=kCustom, calls=%start
  %a0 = bf16[2,8]{1,0} get-tuple-element(%a), index=0
  %a1 = bf16[8,8]{1,0} get-tuple-element(%a), index=1
  %b = (f32[4]{0}, bf16[2,8]{1,0}, bf16[8,8]{1,0}, bf16[8,8]{1,0}) fusion(%a0, %a1, %v), \
kind=kOutput, calls=%beside
  %b1 = bf16[2,8]{1,0} get-tuple-element(%b), index=1
  %b3 = bf16[8,8]{1,0} get-tuple-element(%b), index=3
  ROOT %all = bf16[8,8]{1,0} fusion(%b1, %b3), kind=kCustom, calls=%done
}
"""


def test_a_gather_that_runs_beside_computations_counts_once_where_it_starts():
  """A shard of 32 bytes goes to three others; 16 bytes are read and written beside it."""
  moved = traffic.traffic(CHAIN)
  assert moved.collectives == (traffic.Collective('all-gather', (0, 1, 2, 3), 96.0),)
  assert moved.memory_bytes == 32 + 128 + 16 + 16
  assert traffic.traffic(CHAIN.replace('{{0,1,2,3}}', '{}')) == moved  # no groups: all devices


def overlapped_bytes(hlo: str) -> list[float]:
  return [collective.overlapped_bytes for collective in traffic.traffic(hlo).collectives]


def test_a_chain_is_overlapped_if_a_product_runs_within_it():
  negation = '%y = f32[4]{0} negate(%x)'
  assert negation in CHAIN and overlapped_bytes(CHAIN) == [0.0]
  for product in ('dot(%x, %x)', 'convolution(%x, %x), dim_labels=bf_io->bf'):
    assert overlapped_bytes(CHAIN.replace(negation, f'%y = f32[4]{{0}} {product}')) == [96.0]


ASYNC = """HloModule step, num_partitions=4

%square (w: f32[8,8]) -> f32[8,8] {
  %w = f32[8,8]{1,0} parameter(0)
  ROOT %w2 = f32[8,8]{1,0} dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[8,8]) -> (f32[32,8], f32[8,8]) {
  %x = f32[8,8]{1,0} parameter(0)
  BEFORE
  %start = (f32[8,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  BETWEEN
  %done = f32[32,8]{1,0} all-gather-done(%start)
  AFTER
  ROOT %both = (f32[32,8]{1,0}, f32[8,8]{1,0}) tuple(%done, %y)
}
"""
PRODUCTS = ['dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}',
            'fusion(%x), kind=kOutput, calls=%square', 'custom-call(%x), custom_call_target="tpu_custom_call"']


@pytest.mark.parametrize('product', PRODUCTS)
@pytest.mark.parametrize('at, overlapped', [('BEFORE', 0.0), ('BETWEEN', 3 * 256.0), ('AFTER', 0.0)])
def test_a_collective_is_overlapped_if_a_product_stands_between_its_start_and_its_end(product, at, overlapped):
  hlo = ASYNC.replace(at, f'%y = f32[8,8]{{1,0}} {product}')
  for other in {'BEFORE', 'BETWEEN', 'AFTER'} - {at}:
    hlo = hlo.replace(f'  {other}\n', '')
  assert overlapped_bytes(hlo) == [overlapped]
  assert overlapped_bytes(hlo.replace(product, 'negate(%x)')) == [0.0]
  assert [collective.sent_bytes for collective in traffic.traffic(hlo).collectives] == [3 * 256.0]


def test_a_collective_that_is_not_known_is_an_error():
  unknown = '%all-gather.9 = f32[8]{0} ragged-all-to-all(%state), x=1\n  '
  with pytest.raises(ValueError, match='all-gather.9: what a ragged-all-to-all sends is not known'):
    traffic.traffic(TPU.replace('%i = s32[] get', f'{unknown}%i = s32[] get'), slices=2)


SLICED = '''HloModule pass

ENTRY %main (weight: bf16[64,32]) -> bf16[16,32] {
  %weight = bf16[64,32]{1,0} parameter(0)
  %start = ((bf16[64,32]{1,0}), bf16[16,32]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%weight), \
slice={[0:16], [0:32]}
  ROOT %done = bf16[16,32]{1,0:T(8,128)S(1)} slice-done(%start)
}
'''


def test_a_slice_fetched_into_a_chips_own_memory_is_read_and_the_rest_of_its_array_is_not():
  assert traffic.traffic(SLICED).memory_bytes == 2 * 16 * 32
  assert traffic.traffic(SLICED.replace('S(1)', '')).memory_bytes == 2 * 2 * 16 * 32


SCATTERED = '''HloModule pass

%write (cache: f32[64,128], slots: s32[2,1], new: f32[2,128]) -> f32[64,128] {
  %cache = f32[64,128]{1,0} parameter(0)
  %slots = s32[2,1]{1,0} parameter(1)
  %new = f32[2,128]{1,0} parameter(2)
  ROOT %written = f32[64,128]{1,0} scatter(%cache, %slots, %new), update_window_dims={1}, to_apply=%set
}

ENTRY %main (cache.1: f32[64,128], slots.1: s32[2,1], new.1: f32[2,128]) -> f32[64,128] {
  %cache.1 = f32[64,128]{1,0} parameter(0)
  %slots.1 = s32[2,1]{1,0} parameter(1)
  %new.1 = f32[2,128]{1,0} parameter(2)
  ROOT %fusion = f32[64,128]{1,0} fusion(%cache.1, %slots.1, %new.1), kind=kCustom, calls=%write
}
'''


def test_entries_scattered_into_a_cache_are_read_and_written_and_the_rest_of_it_is_not():
  entries, indices = 4 * 2 * 128, 4 * 2
  assert traffic.traffic(SCATTERED).memory_bytes == entries + entries + entries + indices
