"""A page in the browser to try a model on images: overlay, classes on and off, confidence at a point, download.

example: python trainer/app.py --checkpoint runs/ade20k-m2f/checkpoints/best.pt
The page is served to this computer only. To use it from another one: ssh -L 7860:127.0.0.1:7860 HOST. Uploads are kept
in a temporary folder until the program ends. Needs: pip install 'maskstream[app]'
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import tempfile
import threading
from pathlib import Path

try:
    from shards.cli.command_line import run_entry_point
    from shards.errors import ConfigError
    from trainer.model_options import add_checkpoint_options, open_pretrained
except ImportError as error:
    raise SystemExit(f"error: {error}; is MaskStream installed (pip install -e .), or does another package named "
                     "shards or trainer shadow it?") from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_options(parser)
    parser.add_argument("--port", type=int, default=7860, help="port on 127.0.0.1; 0: any free one (default: 7860)")
    parser.add_argument("--max-megabytes", type=float, default=50, help="largest upload (default: 50)")
    parser.add_argument("--max-megapixels", type=float, default=50, help="largest image (default: 50)")
    arguments = parser.parse_args()
    for name, value, most in (("--port", arguments.port, 65535), ("--max-megabytes", arguments.max_megabytes, 2000),
                              ("--max-megapixels", arguments.max_megapixels, 500)):
        if not (0 if name == "--port" else 0.01) <= value <= most:
            raise ConfigError(f"{name} is {value}, legal: {0 if name == '--port' else 0.01} to {most}")
    return _serve(arguments)


def end_as_after_ctrl_c() -> None:
    """Make other signals to end remove the uploads too, unless they are ignored, as below nohup."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def _serve(arguments: argparse.Namespace) -> int:
    end_as_after_ctrl_c()
    with tempfile.TemporaryDirectory(prefix="maskstream-app-") as folder:
        # Read by gradio when it is imported: uploads and results go to the folder, and nothing is reported anywhere.
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
        try:
            from trainer.serving.page import Limits, build_page, serve
        except ImportError as error:
            raise ConfigError(f"{error}; the page needs: pip install 'maskstream[app]'") from error
        pretrained = open_pretrained(arguments)
        limits = Limits(megabytes=arguments.max_megabytes, megapixels=arguments.max_megapixels)
        page = build_page(pretrained, Path(folder), limits, title=f"MaskStream: {Path(arguments.checkpoint).name}")
        try:
            address = serve(page, arguments.port, limits)
        except OSError as error:
            raise ConfigError(f"--port {arguments.port}: {error}; choose another, or 0 for any free one") from error
        print(f"serving on {address} (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # which is how it ends
            threading.Event().wait()
        page.close(verbose=False)
    return 0


if __name__ == "__main__":
    run_entry_point(main)
