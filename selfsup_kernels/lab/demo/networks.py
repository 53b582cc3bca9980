"""The networks of the demo: a small convolutional encoder and the two heads of the methods."""

from torch import nn

FEATURES = 256
"""Width of the encoder's output, which the evaluation reads."""

EMBEDDING = 128
"""Width of the projected rows, which the losses read."""


def encoder(width=24) -> nn.Sequential:
    def block(inputs, outputs, stride):
        return [
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]

    return nn.Sequential(
        *block(1, width, 1),
        *block(width, 2 * width, 2),
        *block(2 * width, 4 * width, 2),
        nn.Flatten(),
        nn.Linear(4 * width * 4, FEATURES, bias=False),
        nn.BatchNorm1d(FEATURES),
        nn.ReLU(inplace=True),
    )


def head(inputs, hidden=FEATURES, outputs=EMBEDDING) -> nn.Sequential:
    """The projector of both methods, and the predictor of BYOL."""
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs)
    )
