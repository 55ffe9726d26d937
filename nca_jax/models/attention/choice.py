"""Which kernel attends over packed rows: once a run, by its config and the mesh's platform."""

from ml_collections import ConfigDict

from nca_jax.checks import UserError
from nca_jax.models.attention import splash


def attention_kernel(config: ConfigDict, platform: str) -> str:
    """Returns "pairs" or "splash". Raises UserError where splash cannot compute these rows."""
    data, asked = config.data, config.model.attention
    if asked == "pairs" or (asked == "auto" and platform != "tpu"):
        return "pairs"
    for is_bad, message in (
        (
            data.block % splash.LANES,
            f"wants config.data.block in multiples of {splash.LANES}; it is {data.block}",
        ),
        (
            data.row_len > 0 and splash.Code.of(data.row_len, data.align) is None,
            f"of config.data.row_len={data.row_len} wants segments that lie at larger multiples "
            f"than config.data.align={data.align}: 8 up to rows of 4096, 16 up to 8192, 64 up to "
            "16384, 128 up to 32768",
        ),
    ):
        if is_bad:
            raise UserError(f"Splash attention {message}, or set config.model.attention='pairs'.")
    return "splash"


def splash_blocks(config: ConfigDict, kernel: str) -> splash.Blocks:
    """Returns the sizes of `config.model.splash`. Raises UserError where splash has no such."""
    asked, data = config.model.splash, config.data
    if asked and kernel != "splash":
        raise UserError(
            "config.model.splash is read by splash attention alone; set "
            "config.model.attention='splash'."
        )
    return splash.parse_blocks(asked, block=data.block, row_len=data.row_len)
