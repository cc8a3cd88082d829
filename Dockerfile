# One image for every process: web front, workers, pusher. See docs/containers.md for how to build and run it.
ARG PYTHON=3.12
# hub id of weights to put into the image, for machines without access to the hub; empty: none
ARG BAKE_MODEL=


FROM python:${PYTHON}-slim AS build
# cpu: PyTorch's own build without CUDA; cuda: PyPI's build with its CUDA libraries (several GB)
ARG TORCH=cpu
ARG BAKE_MODEL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY requirements.txt /app/
RUN case "$TORCH" in \
      cpu) pip install --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' /app/requirements.txt)" ;; \
      cuda) ;; \
      *) echo "TORCH must be cpu or cuda, not '$TORCH'" >&2; exit 1 ;; \
    esac \
 && pip install -r /app/requirements.txt

# before the code, so that a code change does not download the weights again
RUN mkdir -p /opt/weights \
 && if [ -n "$BAKE_MODEL" ]; then \
      HF_HOME=/opt/weights python -c 'import sys, huggingface_hub as hub; \
hub.snapshot_download(sys.argv[1], allow_patterns=["*.json", "*.txt", "*.safetensors"])' "$BAKE_MODEL" \
      && chmod -R a+rX /opt/weights; \
    fi

COPY LICENSE model.py _wsgi.py deploy/demo_project.py /app/
COPY backend /app/backend
WORKDIR /app
# A read-only root cannot store bytecode later. Weights that do not load should fail the build, not a machine without a hub.
RUN python -m compileall -q . \
 && if [ -n "$BAKE_MODEL" ]; then \
      HF_HOME=/opt/weights HF_HUB_OFFLINE=1 python -c 'import sys; from backend.detection.checkpoints import load_checkpoint; \
load_checkpoint(sys.argv[1])' "$BAKE_MODEL"; \
    fi


FROM python:${PYTHON}-slim
ARG BAKE_MODEL

# At run time, torch compiles kernels for the processor, and Triton compiles launchers for its GPU kernels.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*

# The processes write to /data and /tmp only: mount both, and the root file system can be read-only.
RUN groupadd --gid 10001 backend \
 && useradd --uid 10001 --gid backend --home-dir /data --no-create-home --shell /usr/sbin/nologin backend \
 && install -d -o backend -g backend /data

COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/weights /opt/weights
COPY --from=build /app /app
WORKDIR /app

ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Compiled kernels need a folder that allows execution, and /tmp is often mounted without it.
ENV HOME=/data MODEL_DIR=/data TORCHINDUCTOR_CACHE_DIR=/data/compiled TRITON_CACHE_DIR=/data/compiled/triton
# an empty variable counts as not set
ENV MODEL=${BAKE_MODEL} HF_HUB_OFFLINE=${BAKE_MODEL:+1} HF_HOME=${BAKE_MODEL:+/opt/weights}
ENV HF_HOME=${HF_HOME:-/data/huggingface}

USER 10001:10001
VOLUME /data
EXPOSE 9090
# for the web front; containers without a web front must disable it
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as r; \
r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' \
+ (os.environ.get('PORT') or '9090') + '/health', timeout=2)"]
ENTRYPOINT ["python", "-m", "backend"]
CMD ["serve"]
