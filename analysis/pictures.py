"""Which pictures a sweep's report has: scores, training, norms, and what lies over the images."""

from __future__ import annotations

from dataclasses import dataclass

from analysis import cost_pictures, discovery_pictures, learning_pictures, map_pictures, norm_pictures, score_pictures
from analysis.figures.style import Drawn
from analysis.layout import arrange
from analysis.results import Results


@dataclass(frozen=True)
class Pictures:
    """What could be drawn, and why the rest could not."""

    drawn: tuple[Drawn, ...]
    problems: tuple[str, ...]


def draw(results: Results) -> Pictures:
    """All pictures that the published files allow; the reasons for those that are missing are said as problems."""
    frames, scores = results.frames, results.scores
    layout = arrange(frames)
    problems: list[str] = []
    drawn = [
        *score_pictures.draw(results, layout, problems),
        *learning_pictures.draw(frames, layout, problems),
        *discovery_pictures.draw(frames, layout, scores),
        *norm_pictures.draw(results, layout, problems),
        *map_pictures.draw(frames, layout, problems),
        *cost_pictures.draw(results, layout, problems),
    ]
    return Pictures(tuple(drawn), tuple(problems))
