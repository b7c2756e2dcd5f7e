"""The fused MoE family as a value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from fixer.base.json_reading import Reader, field_names
from fixer.families.family import Family
from fixer.families.fused_moe.arguments import ElementType, kernel_name, operand_types
from fixer.families.fused_moe.rules import descriptor_projections, makes_sense, tokens_per_expert
from fixer.families.fused_moe.seeds import plain_tiles, same_tokens, weight_of
from fixer.families.fused_moe.work import layer_work
from fixer.machine.cards import Card
from fixer.sglang.file_names import pairs_of_names
from fixer.sglang.lookup import CONFIG_DIR_VARIABLE
from fixer.sglang.own_choices import OwnChoice, own_choices
from fixer.sglang.releases import release_key
from fixer.sglang.tree import Lookup, Tree, TuningFile
from fixer.workload import MOE_AXES, NumberFormat, Projection, RowTiles, Tile, Workload


class FusedMoe(Family):
    """SGLang's fused experts: `fused_moe_kernel`, run twice a layer; both products share one sorting of the tokens."""

    name = "fused_moe"
    layer = "MoE layer"
    kernels = "MoE kernels"
    workload_type = Workload
    product_names = ("gate-up", "down")
    phases = ("up", "down")
    axes = MOE_AXES
    kernel_names = ("fused_moe_kernel", "fused_moe_kernel_gptq_awq")
    overlay_variable = CONFIG_DIR_VARIABLE

    # ---- rows

    def check_row(self, tiles: RowTiles, sglang: str = "") -> None:
        """SGLang sorts tokens into blocks once for both products, and would overrule the down projection's height."""
        super().check_row(tiles, sglang)
        if tiles.gate_up.block_m != tiles.down.block_m:
            raise ValueError(f"{tiles.gate_up} and {tiles.down}: gate_up and down differ in BLOCK_SIZE_M")
        if tiles.gate_up.use_tma and not (sglang and release_key(sglang) >= (0, 5, 18)):
            raise ValueError("USE_TMA breaks SGLang before 0.5.18 in a gate_up file")

    def check_asked(self, workload: Workload, card: str, names: tuple[str, ...]) -> None:
        """The names are those of the layer, by the rules of one release or another."""
        pairs = pairs_of_names(workload, card)
        if names not in pairs:
            name, wanted = next((mine, its) for mine, its in zip(names, pairs[0], strict=True) if mine != its)
            raise ValueError(f"it names the file {name}, and its layer's is {wanted}")

    def may_describe(self, product: Projection, tree: Tree | None = None) -> bool:
        """The down projection's file always; the gate-up's from 0.5.18."""
        return product is not Projection.GATE_UP or (tree is not None and tree.takes_gate_up_tma)

    def writable(self, tiles: RowTiles) -> RowTiles:
        """USE_TMA in a gate-up file stops 0.5.17 (an argument that its kernel lacks)."""
        return RowTiles(replace(tiles.gate_up, use_tma=False), tiles.down)

    # ---- the space and the search

    def allows(self, tile: Tile, workload: Workload) -> bool:
        """Block-wise scales bind BLOCK_SIZE_K: a step along K must stay within one block's scale."""
        return workload.block_shape is None or workload.block_shape[1] % tile.block_k == 0

    def descriptors(self, tree: Tree, workload: Workload, card: Card) -> frozenset[Projection]:
        """See `rules.descriptor_projections`."""
        return descriptor_projections(workload, card.capability, tree.takes_descriptors)

    def makes_sense(self, tile: Tile, workload: Workload, tokens: int) -> bool:
        """See `rules.makes_sense`."""
        return makes_sense(tile, workload, tokens)

    def block_rows(self, workload: Workload, tokens: int) -> float:
        """A block holds one expert's tokens."""
        return tokens_per_expert(workload, tokens)

    def element_bytes(self, workload: Workload) -> tuple[int, int]:
        """By the number format."""
        activation, weight = operand_types(workload)
        return ElementType(activation).itemsize, ElementType(weight).itemsize

    def anchors(self, workload: Workload, block_m: int) -> Iterable[Tile]:
        """See `seeds.plain_tiles`."""
        return plain_tiles(workload, block_m)

    def shipped_files(self, tree: Tree) -> Iterable[TuningFile]:
        """See `Tree.shipped_files`."""
        return tree.shipped_files()

    def seed_weight(self, file: TuningFile, workload: Workload, card: Card) -> float:
        """See `seeds.weight_of`."""
        return weight_of(file, workload, card)

    def same_tokens(self, file: TuningFile, workload: Workload, tokens: int) -> float:
        """See `seeds.same_tokens`."""
        return same_tokens(file, workload, tokens)

    def is_related(self, workload: Workload, other: Workload) -> bool:
        """The same number format and kind of scales."""
        same_format = other.number_format is workload.number_format
        return same_format and bool(other.block_shape) == bool(workload.block_shape)

    # ---- SGLang

    def folder(self, tree: Tree) -> Path:
        """The running Triton's."""
        return tree.triton_folder

    def folder_name(self, triton: str) -> str:
        """By the Triton's version."""
        return f"configs/triton_{triton.replace('.', '_')}"

    def reads_overlay(self, tree: Tree) -> bool:
        """SGLANG_MOE_CONFIG_DIR, from 0.5.3."""
        return tree.reads_config_dir_variable

    def lookup(self, tree: Tree, workload: Workload, card: Card, *, without_moefix: bool = False) -> Lookup:
        """See `Tree.lookup`."""
        return tree.lookup(workload, card, without_moefix=without_moefix)

    def own_choices(self, tree: Tree, lookup: Lookup, workload: Workload, card: Card) -> Callable[[int], OwnChoice]:
        """See `own_choices`."""
        return own_choices(tree, lookup, workload, card)

    def turning_points(self, workload: Workload) -> tuple[int, ...]:
        """SGLang's default changes above M = E (get_default_config)."""
        return workload.experts, workload.experts + 1

    def kernel_source(self, tree: Tree) -> Path:
        """The file with `fused_moe_kernel`."""
        return tree.kernel_source

    def kernel_name(self, workload: Workload) -> str:
        """See `arguments.kernel_name`."""
        return kernel_name(workload)

    # ---- words and records

    def read_workload(self, reader: Reader) -> Workload:
        """One shard's layer."""
        reader.only(field_names(Workload))
        return Workload(
            experts=reader.whole("experts", 1, 1 << 16),
            intermediate=reader.whole("intermediate", 1, 1 << 20),
            hidden_size=reader.whole("hidden_size", 1, 1 << 20),
            top_k=reader.whole("top_k", 1, 1 << 12),
            number_format=reader.one_of("number_format", NumberFormat),
            activation_dtype=reader.text("activation_dtype", 40),
            block_shape=None if reader.value("block_shape") is None else reader.pair("block_shape"),
            per_channel_quant=reader.flag("per_channel_quant"),
            group_size=reader.whole("group_size", 0, 1 << 20),
            has_zero_points=reader.flag("has_zero_points"),
            gated=reader.flag("gated"),
            tp_size=reader.whole("tp_size", 1, 1 << 16),
            ep_size=reader.whole("ep_size", 1, 1 << 16),
        )

    def label(self, workload: Workload) -> str:
        """ "E=128,N=768,fp8_w8a8"."""
        return f"E={workload.experts},N={workload.intermediate},{workload.number_format.value}"

    def describe(self, workload: Workload) -> str:
        """ "E=128,N=768 fp8_w8a8 tp 1"."""
        shape = f"E={workload.experts},N={workload.intermediate}"
        return f"{shape} {workload.number_format.value} tp {workload.tp_size}"

    def facts(self, workload: Workload) -> list[tuple[str, str]]:
        """Shape, format and shard."""
        details = [
            f"block scales {workload.block_shape[0]} by {workload.block_shape[1]}" if workload.block_shape else "",
            "a scale per output channel" if workload.per_channel_quant else "",
            f"groups of {workload.group_size}" if workload.group_size else "",
        ]
        parts = (workload.number_format.value, workload.activation_dtype, *details)
        return [
            ("Experts, E", str(workload.experts)),
            ("Intermediate size, N", str(workload.intermediate)),
            ("Hidden size", str(workload.hidden_size)),
            ("Experts a token", str(workload.top_k)),
            ("Number format", ", ".join(filter(None, parts))),
            ("Tensor, expert parallel", f"{workload.tp_size}, {workload.ep_size}"),
        ]

    def number_format(self, workload: Workload) -> NumberFormat:
        """The workload's."""
        return workload.number_format

    def work(self, workload: Workload, tokens: int) -> tuple[float, float]:
        """See `fixer.families.fused_moe.work`."""
        work = layer_work(workload, tokens)
        return work.moved, work.operations


FUSED_MOE = FusedMoe()
