"""The plots of a generation and of a benchmark: titles, panels, colors, and the mean."""

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from flashmoe_mlx.profile import plot
from flashmoe_mlx.profile.layers import PARTS


def layer(number, steps=3):
    times = {f"{part}_ms": number + place for place, part in enumerate(PARTS)}
    return {**times, "hit_rate": 0.25 * number, "steps": steps}


def run(steps=3, reads=7):
    phase = {"tokens_per_s": 83.887, "bytes_per_s": 1.8e8, "reads": reads}
    return {
        "phases": {"prompt": phase | {"tokens_per_s": 171.2}, "generation": phase},
        "layers": {
            "prompt": [layer(1), layer(2)],
            "generation": [layer(3, steps), layer(4, steps)],
        },
        "tokens_per_s": [50.0, 150.0, 100.0],
    }


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Return a function that draws, and returns the figure."""
    figures, save = [], Figure.savefig

    def saved(figure, *args, **options):
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", saved)

    def draw(function, *args):
        function(tmp_path / "plot.png", *args)
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return draw


def test_a_run_has_three_panels(drawn):
    figure = drawn(plot.plot_run, run(), "qwen")
    assert figure.get_suptitle() == "qwen: 83.9 tok/s, 0.18 GB/s while reading"
    assert figure.get_supxlabel().endswith("makes their run slower than an untimed one.")
    times, rates, speed = figure.axes
    assert [bar.get_height() for bar in times.patches] == [3, 4, 4, 5, 5, 6, 6, 7, 7, 8]
    assert [text.get_text() for text in times.get_legend().texts] == list(PARTS)
    assert rates.get_ylabel() == "hit rate, %" and list(rates.lines[0].get_ydata()) == [75, 100]
    one, mean = speed.lines
    assert list(one.get_xdata()) == [2, 3, 4] and list(one.get_ydata()) == [50, 150, 100]
    assert set(mean.get_ydata()) == {83.887}
    assert [text.get_text() for text in speed.get_legend().texts] == ["mean 83.9"]


def test_a_run_without_single_steps_shows_the_prompts_layers(drawn):
    figure = drawn(plot.plot_run, run(steps=0, reads=0) | {"tokens_per_s": []}, "qwen")
    assert figure.get_suptitle() == "qwen: 171.2 tok/s, no reads"
    times, rates, speed = figure.axes
    assert times.patches[0].get_height() == 1 and list(rates.lines[0].get_ydata()) == [25, 50]
    assert len(speed.lines) == 1 and not len(speed.lines[0].get_xdata())


def test_a_benchmark_has_two_panels(drawn):
    figure = drawn(plot.plot, [layer(1), layer(2)], "decode, 25.00 tok/s")
    assert figure.get_suptitle() == "decode, 25.00 tok/s"
    assert [axes.get_ylabel() for axes in figure.axes] == ["ms per step", "hit rate, %"]
    assert "untimed" in figure.get_supxlabel()


def test_colors_differ_for_people_who_see_no_red_or_no_green():
    """Okabe and Ito's palette: seen through either deficiency, all pairs stay apart."""
    no_red = (0.112, 0.886, 0.001), (0.112, 0.886, 0.001), (0.004, -0.004, 1.0)
    no_green = (0.293, 0.707, 0.0), (0.293, 0.707, 0.0), (-0.021, 0.021, 1.0)
    colors = [tuple(part**2.2 for part in to_rgb(color)) for color in plot.COLORS.values()]
    for seen_by in (no_red, no_green):
        seen = [[sum(map(float.__mul__, row, color)) for row in seen_by] for color in colors]
        for place, one in enumerate(seen):
            for other in seen[place + 1 :]:
                assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) > 0.01
