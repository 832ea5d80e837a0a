"""What a sweep's results look like in Python, cell by cell; analyse_a_sweep.md beside it is its output."""
# ruff: noqa: B018

# %% [markdown]
# # A sweep in a notebook
#
# `analysis.load` reads what a sweep has published, finished or still running. This page is the output of
# `python docs/examples/render.py docs/examples/analyse_a_sweep.py runs/quickstart` after
# `orchestrate sweep sweeps/quickstart.yaml`; the cells can be run one by one in an editor that knows `# %%`.
# %%
import sys
from pathlib import Path

import analysis

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
sweep = analysis.load(FOLDER)
sweep

# %% [markdown]
# ## The question and its answer
#
# The answer claims only what intervals support, and may be that the data cannot tell.

# %%
sweep.question

# %%
sweep.answer

# %% [markdown]
# ## Tables for reading
#
# By default a table shows the first primary metric, with registers in the columns and all other axes in the rows. What
# is in bold is the best of its row, and supported to be better than the baseline.

# %%
sweep.table()

# %%
print(sweep.table(show="spread").to_latex())

# %% [markdown]
# ## Numbers
#
# Frames are pandas DataFrames with pyarrow's types, so that null stays null. `pivot` gives one number of each cell.

# %%
sweep.pivot(sweep.primary[0], values="delta").round(4)

# %%
columns = ["metric", "n", "mean", "delta", "delta_low", "delta_high", "p_adjusted", "interval_method"]
sweep.ablation[sweep.ablation["primary"]][[*sweep.axes, *columns]].head(4).T

# %% [markdown]
# ## Learning curves
#
# Tidy, a row a trial and step: here the mean loss of all seeds at the last step.

# %%
curves = sweep.curves("train/loss")
last = curves[curves["step"] == curves["step"].max()]
last.groupby(list(sweep.axes))["value"].agg(["count", "mean"]).round(3)

# %% [markdown]
# ## Figures
#
# A figure displays itself; `sweep.figure(NAME).save("FILE.svg")` writes it.

# %%
sweep.figures()

# %%
sweep.figure("norms_by_layer")

# %% [markdown]
# ## Two sweeps
#
# `sweep.compare(other)` says what changed in settings, code and data, and in every number, with its interval. Compared
# with itself, the trials of a sweep are the same trials, and there is nothing to test.

# %%
sweep.compare(analysis.load(FOLDER)).answer

# %%
sweep.warnings
