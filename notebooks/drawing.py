"""The lessons draw with this: colours that colour-blind readers can tell apart, and pictures with alternative text."""

import io

import matplotlib.pyplot as plt
from IPython.display import Image, display
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
plt.rcParams.update(
    {"figure.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": 80, "image.interpolation": "nearest"}
)


def show(figure: Figure, alt: str) -> None:
    """Show a figure as a picture whose alternative text says what a reader should see in it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    plt.close(figure)
    display(Image(file.getvalue(), alt=alt))
