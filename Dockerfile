# The two commands in a container. We could not run this here, for want of Docker; what it does is what README's
# "Start" does on Debian 12, where it is tested.
#
#     docker build -t dgutils .
#     docker run --rm -it dgutils                       # make reproduce; add --gpus all on a machine with GPUs
#     docker run --rm -it dgutils make test
#     docker run --rm -it -p 8888:8888 dgutils make lab ARGS="--no-browser --ip=0.0.0.0"
#
# `-v dgutils-runs:/dgutils/runs` keeps what was computed; `-e DGUTILS_DATA=/data -v FOLDER:/data:ro` brings data along.
FROM debian:12-slim
RUN apt-get update && apt-get install -y --no-install-recommends \
        ca-certificates git make python3 python3-venv dataset-fashion-mnist \
        latexmk texlive-latex-recommended texlive-fonts-recommended \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /dgutils
# The packages first: a change of the code does not install them again.
COPY Makefile requirements.txt ./
COPY dgutils/setup.sh dgutils/setup.sh
RUN make .venv/.complete
COPY . .
RUN touch .venv/.complete
CMD ["make", "reproduce"]
