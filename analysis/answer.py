"""What a sweep says to its question, first in plain words, then metric by metric with its uncertainty; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.collect import SweepPlan
from analysis.elimination import NO_IMAGES, NO_VARIANCE, ONE_SEED
from analysis.labels import REGISTERS, axis_labels, cell_text, joined, metric_label, registers, unit, value_text
from analysis.schemas import LOST, canonical

LEVEL = 0.05
_MOST_NAMED = 6  # cells named one by one in a sentence; more are counted
_MOST_TRENDS = 4  # sentences of trends and of outliers
_OUTLIERS = "tokens/last/outlier_fraction"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """The answer: a verdict that everybody understands, and sentences that give its numbers."""

    verdict: str
    details: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Everything as one paragraph."""
        return " ".join((self.verdict, *self.details))


@dataclass(frozen=True)
class _Words:
    """How a sweep's cells are named: the axes in which they differ, labels of all axes, and its baseline."""

    varying: tuple[str, ...]
    names: Mapping[str, str]
    baseline: Mapping[str, Any]

    def against(self) -> str:
        return baseline_text(self.baseline, self.names)

    def where(self, rows: Sequence[Row]) -> str:
        """The cells of `rows`: "1, 2 and 4 registers", or their settings, or how many they are."""
        if len(rows) > _MOST_NAMED:
            return f"{len(rows)} other cells"
        if self.varying == (REGISTERS,):
            return registers([row[REGISTERS] for row in rows])
        if len(self.varying) == 1 and self.varying[0] in self.baseline:
            return f"{self.names[self.varying[0]]} = {', '.join(value_text(row[self.varying[0]]) for row in rows)}"
        return " and ".join(f"({cell_text(row, self.varying, self.names)})" for row in rows)


def answer(
    plan: SweepPlan,
    rows: Sequence[Row],
    varying: Sequence[str],
    trends: Sequence[Row] = (),
    elimination: Sequence[Row] = (),
) -> Answer:
    """The answer. A difference is claimed only where `supported` allows it.

    Args:
        rows: rows of the ablation table.
        varying: the axes in which cells differ, which the sentences name.
        trends, elimination: rows of the tables of these names (schemas.TRENDS, schemas.ELIMINATION).
    """
    if not any(row["n"] for row in rows):
        return Answer(f"No answer yet: none of {len(plan.trials)} trials has finished with a score.")
    if not plan.primary:
        return Answer("Cannot tell: the sweep declares no primary metric, so every difference here is exploratory.")
    outliers = _outliers(elimination, plan, varying)
    along = (*_trends(trends, plan), *(said for _, said in outliers[:_MOST_TRENDS]))
    if plan.baseline is None:
        return Answer("Cannot tell: the sweep declares no baseline, so there is nothing to compare with.", along)
    words = _Words(tuple(varying), axis_labels(plan.axes), plan.baseline)
    by_metric = {m: [row for row in rows if row["metric"] == m] for m in plan.primary}
    details = (*(said for metric, own in by_metric.items() for said in _detail(metric, own, words)), *along)
    plain = outliers[0][0] if len(outliers) == 1 else ""
    return Answer(" ".join(filter(None, (_verdict(by_metric, words), plain))), (*details, *_unfinished(by_metric)))


def baseline_text(baseline: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The baseline in words: "0 registers", or its settings."""
    if set(baseline) == {REGISTERS}:
        return registers([baseline[REGISTERS]])
    return cell_text(baseline, baseline, names)


def supported(row: Row) -> bool:
    """Whether a row's difference may be claimed: a primary metric, corrected p below 0.05, an interval without zero."""
    if not row["primary"] or row["p_adjusted"] is None or row["delta_low"] is None:
        return False
    return bool(row["p_adjusted"] < LEVEL and (row["delta_low"] > 0 or row["delta_high"] < 0))


def _verdict(by_metric: Mapping[str, Sequence[Row]], words: _Words) -> str:
    """What differs and by how much, then for which metrics nothing could be shown, and how uncertain that is."""
    claims = [_claim(metric, rows, words) for metric, rows in by_metric.items() if any(map(supported, rows))]
    others = {metric: rows for metric, rows in by_metric.items() if not any(map(supported, rows))}
    if not others:
        return " ".join(claims)
    compared = [row for rows in others.values() for row in rows if row["delta"] is not None]
    if compared and all(map(_is_equal, compared)):
        labels = joined([metric_label(metric) for metric in others], "or")
        return " ".join([*claims, f"No difference in {labels} was seen: equal in every pair."])
    labels = joined([_uncertain(metric, rows) for metric, rows in others.items()], "or")
    if claims:
        return " ".join([*claims, f"No difference could be shown in {labels}."])
    return f"Cannot tell: {_seeds(by_metric)} no difference to {words.against()} could be shown in {labels}."


def _is_equal(row: Row) -> bool:
    """Whether the scores of every pair are equal; of several pairs a mean difference of 0 alone does not say so."""
    bounds = {row["delta_low"], row["delta_high"]}
    return row["delta"] == 0 and (bounds == {0} or (row["n_paired"] == 1 and bounds == {None}))


def _uncertain(metric: str, rows: Sequence[Row]) -> str:
    """A metric and, in brackets, why nothing could be shown of it; one seed says it all elsewhere."""
    compared, label = [row for row in rows if row["delta"] is not None], metric_label(metric)
    if compared and all(row["delta_low"] is None for row in compared):
        return label
    why = _why_not(compared, metric) if compared else "no finished pair"
    return f"{label[:-1]}; {why})" if label.endswith(")") else f"{label} ({why})"


def _claim(metric: str, rows: Sequence[Row], words: _Words) -> str:
    parts = [
        _amount(word, [row for row in rows if supported(row) and (row["delta"] > 0) == rises], metric, words)
        for word, rises in (("lower", False), ("higher", True))
    ]
    said = " and ".join(part for part in parts if part)
    return f"{_capital(metric_label(metric))} is {said} than with {words.against()}."


def _seeds(by_metric: Mapping[str, Sequence[Row]]) -> str:
    """How many paired seeds the comparison rests on."""
    pairs = sorted({row["n_paired"] for rows in by_metric.values() for row in rows if row["n_paired"]})
    if not pairs:
        return "without a finished pair of seeds"
    if pairs == [1] and all(row["delta_low"] is None for rows in by_metric.values() for row in rows):
        return "one seed gives no interval, so"
    count = f"{pairs[0]}" if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
    return f"with {count} seed{'' if pairs == [1] else 's'} each,"


def _detail(metric: str, rows: Sequence[Row], words: _Words) -> tuple[str, ...]:
    """The levels of one metric, and how uncertain its other differences are where some are claimed."""
    claimed = any(map(supported, rows))
    rest = [row for row in rows if row["delta"] is not None and not supported(row)]
    parts = [_levels(metric, rows, words)]
    if claimed and rest:
        parts.append(f"the others cannot be told apart from {words.against()} ({_why_not(rest, metric)})")
    said = "; ".join(part for part in parts if part)
    return (f"{_capital(metric_label(metric))}: {said}.",) if said else ()


def _levels(metric: str, rows: Sequence[Row], words: _Words) -> str:
    """The mean of the baseline and the means of all else, where there is one baseline."""
    kind = unit(metric)
    symbol = f" {kind.symbol}" if kind.symbol else ""
    own = [row for row in rows if "baseline" in row["flags"] and row["mean"] is not None]
    others = sorted(row["mean"] for row in rows if "baseline" not in row["flags"] and row["mean"] is not None)
    if len(own) != 1 or not others:
        return ""
    low, high = kind.text(others[0]), kind.text(others[-1])
    elsewhere = low if low == high else f"{low} to {high}"
    return f"{kind.text(own[0]['mean'])}{symbol} with {words.against()}, {elsewhere}{symbol} elsewhere"


def _amount(word: str, rows: Sequence[Row], metric: str, words: _Words) -> str:
    if not rows:
        return ""
    kind = unit(metric)
    sizes = sorted(abs(row["delta"]) for row in rows)
    by = kind.text(sizes[0], signed=False)
    by = by if len(rows) == 1 else f"{by} to {kind.text(sizes[-1], signed=False)}"
    bounds = (min(row["delta_low"] for row in rows), max(row["delta_high"] for row in rows))
    certainty = "95 % interval" if len(rows) == 1 else "95 % intervals within"
    return f"{word} with {words.where(rows)}, by {by}{kind.of_difference} ({certainty} {kind.interval(*bounds)}),"


def _why_not(rows: Sequence[Row], metric: str) -> str:
    kind = unit(metric)
    bounded = [row for row in rows if row["delta_low"] is not None]
    if not bounded:
        return "one seed gives no interval"
    if all(map(_is_equal, bounded)):
        return "equal in every pair"
    if all(row["p_value"] is None for row in bounded):
        return "all pairs differ by the same amount, which says nothing about chance"
    span = kind.interval(min(row["delta_low"] for row in bounded), max(row["delta_high"] for row in bounded))
    if kind.scale == 100 and any(row["delta_low"] < -1 or row["delta_high"] > 1 for row in bounded):
        return "95 % intervals are wider than the whole scale from 0 to 100 %"
    what = "its 95 % interval is" if len(bounded) == 1 else "95 % intervals span"
    return f"{what} {span}{kind.of_difference}"


def _unfinished(by_metric: Mapping[str, Sequence[Row]]) -> tuple[str, ...]:
    """How many of the planned trials have a score, where not all do."""
    for rows in by_metric.values():
        lost = sum(row[f"n_{status}"] for row in rows for status in LOST)
        scored = sum(row["n"] for row in rows)
        if lost:
            return (f"Only {scored} of {scored + lost} planned trials have a score so far.",)
    return ()


def _trends(trends: Sequence[Row], plan: SweepPlan) -> tuple[str, ...]:
    """Page's trend of each primary metric; of many, those that are significant come first."""
    tested = [row for row in trends if row["primary"] and row["page_p"] is not None]
    names = axis_labels(plan.axes)
    said = []
    for row in sorted(tested, key=lambda row: not _rises_or_falls(row))[:_MOST_TRENDS]:
        axis = "number of registers" if row["axis"] == REGISTERS else names[row["axis"]]
        fixed = [name for name in plan.axes if name != row["axis"] and len(plan.axes[name]) > 1]
        within = f" ({cell_text(row, fixed, names)})" if fixed else ""
        p = _p(row["page_p"] if row["page_p_adjusted"] is None else row["page_p_adjusted"])
        label = metric_label(row["metric"])
        if _rises_or_falls(row):
            said.append(
                f"{_capital(label)}{within} {row['direction']} with the {axis} (Page's trend test, corrected p {p})."
            )
        else:
            said.append(
                f"No trend of {label}{within} with the {axis} could be shown (Page's trend test, corrected p {p})."
            )
    return tuple(said)


def _rises_or_falls(row: Row) -> bool:
    return row["direction"] is not None and row["page_p_adjusted"] is not None and row["page_p_adjusted"] < LEVEL


def _outliers(elimination: Sequence[Row], plan: SweepPlan, varying: Sequence[str]) -> list[tuple[str, str]]:
    """From which number of registers on there are no outliers, in plain words and with its bound, all else equal.

    The plain words are "" where it cannot be told; nothing where numbers of registers do not vary.
    """
    if REGISTERS not in varying:
        return []
    names = axis_labels(plan.axes)
    fixed = [axis for axis in varying if axis != REGISTERS]
    groups: dict[str, list[Row]] = {}
    for row in elimination:
        if row["metric"] == _OUTLIERS:
            groups.setdefault(canonical([row[axis] for axis in fixed]), []).append(row)
    return [_eliminated(rows, cell_text(rows[0], fixed, names) if fixed else "") for rows in groups.values()]


def _eliminated(rows: Sequence[Row], within: str) -> tuple[str, str]:
    limit = f"{100 * rows[0]['limit']:.3g} %"
    label = f"{metric_label(_OUTLIERS)}{f' ({within})' if within else ''}"
    smallest = next((row for row in rows if row["smallest"]), None)
    if smallest is None:
        return "", f"It cannot be told from which number of registers on {label} is below {limit}."
    count = smallest[REGISTERS]
    least = min(row[REGISTERS] for row in rows)
    where = f"Already with {registers([count])}" if count == least else f"From {registers([count])} on"
    claimed = [row for row in rows if row[REGISTERS] >= count]
    bound = f"{100 * max(row['upper'] for row in claimed):.3g} %"
    return (
        f"{where}, fewer than {limit} of patches are outliers{f' ({within})' if within else ''}.",
        f"{_capital(label)} is below {limit} with 95 % confidence from {registers([count])} on "
        f"(upper bound {bound}{_one_source(claimed)}).",
    )


def _one_source(claimed: Sequence[Row]) -> str:
    """Which of the two sources of error the bounds of some cells leave out, and why; "" where none does."""
    images = [row[REGISTERS] for row in claimed if {NO_VARIANCE, ONE_SEED} & {*row["flags"]}]
    seeds = [row[REGISTERS] for row in claimed if NO_IMAGES in row["flags"]]
    parts = [f"; with {registers(images)} of further images alone, as seeds give no bound"] if images else []
    parts += [f"; with {registers(seeds)} of further seeds alone, as single images are not known"] if seeds else []
    return "".join(parts)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
