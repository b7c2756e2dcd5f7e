"""Install a tuning, or what fits, into SGLang's tree before the server starts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fixer.artefacts.artefact import Artefact
from fixer.artefacts.install import Installation, TunedFiles, install_files
from fixer.base.data_folder import scratch_in
from fixer.families.registry import family_of
from fixer.serve.find_or_tune import artefact_for, foreseen
from fixer.serve.run import Run
from fixer.serve.situation import OnCard, Situation

if TYPE_CHECKING:
    from fixer.kernel.fit import CompileFunction
    from fixer.plan.plan import Plan
    from fixer.sglang.tree import Tree


def prepare(run: Run, situation: Situation) -> list[Installation]:
    """Have a tuned pair of files in SGLang's tree for each kind of card, where SGLang reads one."""
    say, installations = run.say, list[Installation]()
    for on in situation.kinds:
        say.line(f"{situation.model.name} on {on.card.name}, SGLang {situation.tree.version}: {on.decision.reason}")
        for note in on.decision.notes:
            say.line(note)
        if not on.is_tunable:
            say.line("nothing to tune")
            continue
        try:
            artefact = artefact_for(run, situation, on)
            if artefact is not None:
                installations.append(install(run, situation, artefact))
        except Exception as error:  # foreseen or not: a server that starts is worth more than a tuning
            if run.options.strict:
                raise foreseen(error) from error
            fault = foreseen(error)
            say.warning(f"{fault.message} {fault.hint}".strip())
            artefact = None
        if artefact is None:
            installations += fitting_instead(run, situation, on)
    return installations


def install(run: Run, situation: Situation, artefact: Artefact) -> Installation:
    """Put an artefact's files where SGLang looks."""
    installation = put(run, situation.tree, TunedFiles.of(artefact))
    run.say.line(f"installed {installation}")
    return installation


def fitting_instead(run: Run, situation: Situation, on: OnCard) -> list[Installation]:
    """Without a tuning: SGLang's own configuration where it fits the card, else one that was compiled to fit.

    Whatever SGLang would read and could not run is moved aside first; where it cannot be, something is put before it.
    """
    from fixer.artefacts.check_files import vet
    from fixer.kernel.cache import CompileCache
    from fixer.kernel.fit import compiler_for

    say = run.say
    try:
        with CompileCache(run.home) as cache:
            compiler = compiler_for(situation.tree, on.card, scratch_in(run.home), cache)
            vetted = vet(situation.tree, on.workload, on.card, situation.rows(on), compiler)
            for bad in vetted.bad:
                say.warning(str(bad))
            if vetted.fits and not vetted.is_stuck:
                say.warning("serving with SGLang's own configuration, which fits this card")
                return []
            left = replace(situation, tree=vetted.tree)
            pair = safe_pair(left, on, compiler, fits=bool(vetted.fits))
        if pair is None:
            say.warning("serving with SGLang's own configuration, which may not run: nothing is known to fit this card")
            return []
        say.warning("serving with a configuration that fits this card and was not measured")
        return [put(run, vetted.tree, pair)]
    except Exception as error:  # as in `prepare`
        say.warning(f"serving with SGLang's own configuration, which was not checked: {foreseen(error).message}")
        return []


def safe_pair(situation: Situation, on: OnCard, compiler: CompileFunction, *, fits: bool) -> TunedFiles | None:
    """Files that the card can run; None where nothing is known to fit.

    Args:
        fits: SGLang's own choices do: then they are written out, to stand before a file that could not be moved away.
    """
    from fixer.plan.make_plan import make_plan

    tree = situation.tree
    if not fits:
        return fitting_pair(make_plan(situation.model, situation.flags, on.card, tree, compiler))
    family = family_of(on.workload)
    lookup = family.lookup(tree, on.workload, on.card)
    choose = family.own_choices(tree, lookup, on.workload, on.card)
    own = {tokens: family.writable(choose(tokens).tiles) for tokens in situation.rows(on)}
    return TunedFiles.from_rows(family, lookup.names, own, tree.version)


def fitting_pair(plan: Plan) -> TunedFiles | None:
    """The plan's proposed files; None where a row has no proposal."""
    workload = plan.decision.workload
    if plan.lookup is None or workload is None or any(row.proposed is None for row in plan.rows):
        return None
    proposed = {row.tokens: row.proposed for row in plan.rows if row.proposed is not None}
    return TunedFiles.from_rows(family_of(workload), plan.lookup.names, proposed, plan.sglang_version)


def put(run: Run, tree: Tree, files: TunedFiles) -> Installation:
    """Put files where a tree looks, and say what became of those that were there."""
    family = files.family
    overlay = family.reads_overlay(tree)
    installation = install_files(family.folder(tree), files, run.home, tree.version, overlay=overlay)
    for note in installation.notes:
        run.say.line(note)
    return installation
