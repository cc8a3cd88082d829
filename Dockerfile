# One image for every process: web front, workers, pusher. docs/containers.md says how to build and run it.
ARG PYTHON=3.12
# a hub id whose weights go into the image, for machines that reach no hub; empty: none
ARG BAKE_MODEL=


FROM python:${PYTHON}-slim AS build
# cpu: PyTorch's own build without CUDA; cuda: the one of PyPI, which brings its CUDA libraries (several GB)
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

# before our code, so that a change of ours does not download it again
RUN mkdir -p /opt/weights \
 && if [ -n "$BAKE_MODEL" ]; then \
      HF_HOME=/opt/weights python -c 'import sys, huggingface_hub as hub; \
hub.snapshot_download(sys.argv[1], allow_patterns=["*.json", "*.txt", "*.safetensors"])' "$BAKE_MODEL" \
      && chmod -R a+rX /opt/weights; \
    fi

COPY LICENSE model.py _wsgi.py deploy/demo_project.py /app/
COPY backend /app/backend
WORKDIR /app
# a root that is read-only keeps no bytecode; weights that do not load are better found here than where no hub is
RUN python -m compileall -q . \
 && if [ -n "$BAKE_MODEL" ]; then \
      HF_HOME=/opt/weights HF_HUB_OFFLINE=1 python -c 'import sys; from backend.detection.checkpoints import load_checkpoint; \
load_checkpoint(sys.argv[1])' "$BAKE_MODEL"; \
    fi


FROM python:${PYTHON}-slim
ARG BAKE_MODEL

# torch compiles kernels for the processor that it finds, and Triton the launchers of those for the GPU, where they run
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*

# all that is ever written lies in /data and /tmp: mount both, and the root can be read-only
RUN groupadd --gid 10001 backend \
 && useradd --uid 10001 --gid backend --home-dir /data --no-create-home --shell /usr/sbin/nologin backend \
 && install -d -o backend -g backend /data

COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/weights /opt/weights
COPY --from=build /app /app
WORKDIR /app

ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# /tmp is often mounted without the right to run what lies there, which the compiled kernels need
ENV HOME=/data MODEL_DIR=/data TORCHINDUCTOR_CACHE_DIR=/data/compiled TRITON_CACHE_DIR=/data/compiled/triton
# empty counts as not set
ENV MODEL=${BAKE_MODEL} HF_HUB_OFFLINE=${BAKE_MODEL:+1} HF_HOME=${BAKE_MODEL:+/opt/weights}
ENV HF_HOME=${HF_HOME:-/data/huggingface}

USER 10001:10001
VOLUME /data
EXPOSE 9090
# of the web front; what runs no web front switches it off
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as r; \
r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' \
+ (os.environ.get('PORT') or '9090') + '/health', timeout=2)"]
ENTRYPOINT ["python", "-m", "backend"]
CMD ["serve"]
