// Runs in the live page before its own scripts and writes down what a person would see, in `window.diary`. Moments are
// milliseconds of the page's clock.
window.diary = { keys: {}, shown: [], superseded: [], finals: [], errors: [], bytes: 0, closes: [] };
{
  let key = 0;
  addEventListener("input", ({ timeStamp }) => (key = timeStamp), { capture: true });

  const { send } = WebSocket.prototype;
  WebSocket.prototype.send = function (text) {
    const message = JSON.parse(text);
    if (message.type === "generate") {
      if (!this.isWatched) watch(this);
      diary.keys[message.seq] = key;
    }
    return send.call(this, text);
  };

  function watch(socket) {
    socket.isWatched = true;
    socket.addEventListener("close", ({ code }) => diary.closes.push(code));
    socket.addEventListener("message", ({ data }) => {
      diary.bytes += data.byteLength ?? data.length;
      const message = JSON.parse(typeof data === "string" ? data : headerOf(data));
      if (message.type === "final" && !message.refined) diary.finals.push(message.seq);
      if (message.type === "superseded" && !message.refined) diary.superseded.push(message.seq);
      if (message.type === "error") diary.errors.push(message.error.message);
    });
  }

  function headerOf(data) {
    const length = new DataView(data).getUint32(0);
    return new TextDecoder().decode(new Uint8Array(data, 4, length));
  }

  // Each picture that reaches the screen is drawn once at first; blends that follow draw the same bitmap again.
  const { drawImage } = CanvasRenderingContext2D.prototype;
  const known = new WeakSet();
  CanvasRenderingContext2D.prototype.drawImage = function (image, ...place) {
    drawImage.call(this, image, ...place);
    if (this.canvas.id !== "picture" || known.has(image)) return;
    known.add(image);
    const at = performance.now();
    queueMicrotask(() => {
      const { seq, state, refined } = document.getElementById("stage").dataset;
      diary.shown.push({ at, seq: Number(seq), isFinal: state === "final", isRefined: refined === "true" });
    });
  };
}
