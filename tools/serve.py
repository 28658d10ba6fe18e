"""Serve a model over HTTP: OpenAI's API for clients and benchmark harnesses, and a web page for people.

    python tools/serve.py --model HF_DIR_or_CKPT [--port 8000]
    torchrun --nproc-per-node 8 tools/serve.py --context-parallel-size 8 --dtype bfloat16 --model HF_DIR_or_CKPT

Then open http://127.0.0.1:8000 in a browser, or point a client at it:

    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="any").chat.completions.create(model="any", messages=[...])

Only this machine is answered, unless --host names another address, which takes --api-key (or the environment variable
VITA_API_KEY, which `ps` does not show). SIGTERM lets running requests finish. docs/serving.md has the API, the limits
and what is measured.

Exit status 0 after SIGTERM or SIGINT, 2 for a usage error, 1 if a rank or the engine has ended.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vita import log
from megatron_vita.errors import ConfigError, VitaError
from megatron_vita.inference.arguments import add_engine_arguments, engine_settings
from megatron_vita.inference.leader import fail
from megatron_vita.inference.openai.limits import Limits
from megatron_vita.serving.settings import ServerSettings


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = ServerSettings()
    parser.add_argument("--model", required=True, help="checkpoint folder, or exported Hugging Face folder")
    parser.add_argument("--video-backend", choices=("auto", "pyav", "decord"), default="auto", help="decodes videos")
    add = parser.add_argument_group("server").add_argument
    add(
        "--host",
        default=default.host,
        help="address to listen on; not loopback: needs --api-key (default: %(default)s)",
    )
    add("--port", type=int, default=default.port, help="0: a free one, which is logged (default: %(default)s)")
    add("--api-key", default=os.environ.get("VITA_API_KEY"), help="what clients send as bearer token (or VITA_API_KEY)")
    add(
        "--allowed-host",
        action="append",
        default=[],
        help="another host name under which the server may be asked without a key, such as a reverse proxy's",
    )
    add("--served-model-name", help="name of the model for clients (default: its stage or folder)")
    add("--media-root", type=Path, help="folder of media that requests may name by file:// and relative paths")
    add("--allow-fetch", action="store_true", help="download http(s) media, never from private addresses")
    add(
        "--fetch-timeout",
        type=float,
        default=default.fetch_timeout,
        help="seconds for all downloads of a request (default: %(default)s)",
    )
    add("--max-queue", type=int, default=default.max_queue, help="requests that may wait (default: %(default)s)")
    add(
        "--max-pending-bytes",
        type=int,
        default=default.max_pending_bytes,
        help="bodies of all unanswered requests together (default: %(default)s)",
    )
    add(
        "--max-connections",
        type=int,
        default=default.max_connections,
        help="open connections (default: %(default)s)",
    )
    add(
        "--header-timeout",
        type=float,
        default=default.header_timeout,
        help="seconds that a client may be silent while it sends (default: %(default)s)",
    )
    add(
        "--body-rate",
        type=int,
        default=default.body_rate,
        help="bytes a second that a body must come with, at least (default: %(default)s)",
    )
    add(
        "--drain-timeout",
        type=float,
        default=default.drain_timeout,
        help="seconds for running requests after SIGTERM (default: %(default)s)",
    )
    add(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help=f"what one request may hold; repeatable: {', '.join(Limits().to_dict())} (docs/serving.md)",
    )
    add_engine_arguments(parser)
    parser.set_defaults(video_timeout=60.0)  # the answers of all clients wait for it
    return parser.parse_args(argv)


def server_settings(args: argparse.Namespace) -> ServerSettings:
    """The settings that the flags say.

    Raises:
        ConfigError: a value that cannot work.
    """
    return ServerSettings(
        host=args.host,
        port=args.port,
        api_key=args.api_key,
        allowed_hosts=tuple(args.allowed_host),
        model_name=args.served_model_name,
        media_root=args.media_root,
        allow_fetch=args.allow_fetch,
        fetch_timeout=args.fetch_timeout,
        limits=Limits.parse(args.limit),
        max_queue=args.max_queue,
        max_pending_bytes=args.max_pending_bytes,
        max_connections=args.max_connections,
        header_timeout=args.header_timeout,
        body_rate=args.body_rate,
        drain_timeout=args.drain_timeout,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Serve; 0 after a signal, 2 for a usage error, 1 otherwise."""
    args = arguments(argv)
    log.configure()
    try:
        settings, engine = server_settings(args), engine_settings(args)
        if not Path(args.model).is_dir():
            raise ConfigError(f"{args.model}: no such folder. Give a checkpoint or a Hugging Face folder with --model.")
        try:
            from megatron_vita.serving.run import serve
        except ModuleNotFoundError as error:
            raise ConfigError(
                f'the package {error.name} is missing. Install the server: pip install -e ".[serve]"'
            ) from error
        serve(args.model, engine, settings, video_backend=args.video_backend)
    except VitaError as error:
        return fail("serve", error)
    except KeyboardInterrupt:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
