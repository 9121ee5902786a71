import com.google.protobuf.ByteString;
import inference.GRPCInferenceServiceGrpc;
import inference.GRPCInferenceServiceGrpc.GRPCInferenceServiceBlockingStub;
import inference.GrpcService.InferParameter;
import inference.GrpcService.InferTensorContents;
import inference.GrpcService.ModelInferRequest;
import inference.GrpcService.ModelInferRequest.InferInputTensor;
import inference.GrpcService.ModelInferRequest.InferRequestedOutputTensor;
import inference.GrpcService.ModelReadyRequest;
import io.grpc.CallCredentials;
import io.grpc.ChannelCredentials;
import io.grpc.CompositeChannelCredentials;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.TlsChannelCredentials;
import java.io.File;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Map;
import java.util.concurrent.Executor;
import java.util.concurrent.TimeUnit;

/**
 * Asks a Convoy server two things: what it makes of a tensor, and what it sees in a JPEG.
 *
 * <pre>java Classify ADDRESS IMAGE [AUTHORITY.pem]</pre>
 *
 * With a certificate authority it speaks TLS, and then sends the token in CONVOY_TOKEN, if there is one.
 */
public final class Classify {
    private static final String MODEL = "resnet50";
    private static final long TIMEOUT_SECONDS = 10;
    /** Bytes of an answer, where gRPC's own limit is 4 MB, and of a request that is kept to be sent again. */
    private static final int MOST = 64 << 20;

    /** What a server refuses since it is stopping, or never saw, is asked again, of the next where there are several. */
    private static final Map<String, ?> RETRIES = Map.of(
            "methodConfig",
            List.of(Map.of(
                    "name", List.of(Map.of("service", GRPCInferenceServiceGrpc.SERVICE_NAME)),
                    "retryPolicy", Map.of(
                            "maxAttempts", 4.0,
                            "initialBackoff", "0.1s",
                            "maxBackoff", "2s",
                            "backoffMultiplier", 2.0,
                            "retryableStatusCodes", List.of("UNAVAILABLE")))));

    private final GRPCInferenceServiceBlockingStub stub;

    private Classify(ManagedChannel channel) {
        stub = GRPCInferenceServiceGrpc.newBlockingStub(channel);
    }

    public static void main(String[] arguments) throws Exception {
        if (arguments.length < 2) {
            System.err.println("usage: java Classify ADDRESS IMAGE [AUTHORITY.pem]");
            System.exit(2);
        }
        ManagedChannel channel = connect(arguments[0], arguments.length > 2 ? arguments[2] : null);
        try {
            new Classify(channel).run(Path.of(arguments[1]));
        } catch (StatusRuntimeException error) {
            System.err.println(error.getStatus().getCode() + ": " + error.getStatus().getDescription());
            System.exit(1);
        } finally {
            channel.shutdown().awaitTermination(5, TimeUnit.SECONDS);
        }
    }

    private void run(Path image) throws IOException, InterruptedException {
        waitUntilReady();
        float[] grey = new float[3 * 224 * 224]; // an image, as the network takes it
        Arrays.fill(grey, 0.5f);
        float[] logits = infer(grey, 1, 3, 224, 224);
        System.out.printf("grey: %d logits, the first is %.3f%n", logits.length, logits[0]);
        for (String line : classify(Files.readAllBytes(image), 3)) {
            System.out.println(image.getFileName() + ": " + line);
        }
    }

    /** One channel, which any number of threads may share. */
    private static ManagedChannel connect(String address, String authority) throws IOException {
        ChannelCredentials credentials = InsecureChannelCredentials.create();
        if (authority != null) {
            credentials = TlsChannelCredentials.newBuilder().trustManager(new File(authority)).build();
            String token = System.getenv("CONVOY_TOKEN");
            if (token != null && !token.isEmpty()) {
                credentials = CompositeChannelCredentials.create(credentials, new Token(token));
            }
        }
        return Grpc.newChannelBuilder(address, credentials)
                .defaultServiceConfig(RETRIES)
                .enableRetry()
                .maxInboundMessageSize(MOST)
                .perRpcBufferLimit(MOST)
                .retryBufferSize(4L * MOST)
                .keepAliveTime(30, TimeUnit.SECONDS) // finds out within 40 s that the server's machine is gone
                .keepAliveTimeout(10, TimeUnit.SECONDS)
                .build();
    }

    /** A token that is sent with every call. */
    private static final class Token extends CallCredentials {
        private final Metadata metadata = new Metadata();

        Token(String token) {
            metadata.put(Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + token);
        }

        @Override
        public void applyRequestMetadata(RequestInfo info, Executor executor, MetadataApplier applier) {
            applier.apply(metadata);
        }

        @Override
        public void thisUsesUnstableApi() {}
    }

    private void waitUntilReady() throws InterruptedException {
        ModelReadyRequest request = ModelReadyRequest.newBuilder().setName(MODEL).build();
        // The deadline is one for all calls of this stub; it waits for a server, too.
        GRPCInferenceServiceBlockingStub waiting = stub.withWaitForReady().withDeadlineAfter(1, TimeUnit.MINUTES);
        while (!waiting.modelReady(request).getReady()) {
            Thread.sleep(1000);
        }
    }

    /** Sends the tensor that the model takes: little-endian, row by row. */
    private float[] infer(float[] values, long... shape) {
        ByteBuffer raw = ByteBuffer.allocate(4 * values.length).order(ByteOrder.LITTLE_ENDIAN);
        raw.asFloatBuffer().put(values);
        InferInputTensor.Builder input = InferInputTensor.newBuilder().setName("input").setDatatype("FP32");
        for (long size : shape) {
            input.addShape(size);
        }
        ByteString answer = ask(ModelInferRequest.newBuilder()
                .setModelName(MODEL)
                .addInputs(input)
                .addOutputs(InferRequestedOutputTensor.newBuilder().setName("logits"))
                .addRawInputContents(ByteString.copyFrom(raw))
                .build());
        FloatBuffer found = little(answer).asFloatBuffer();
        float[] logits = new float[found.remaining()];
        found.get(logits);
        return logits;
    }

    /** Sends the file as it is; the server decodes it, and answers with "score:index:label", best first. */
    private List<String> classify(byte[] image, long count) {
        InferParameter classes = InferParameter.newBuilder().setInt64Param(count).build();
        ByteString answer = ask(ModelInferRequest.newBuilder()
                .setModelName(MODEL)
                .addInputs(InferInputTensor.newBuilder()
                        .setName("input")
                        .setDatatype("BYTES")
                        .addShape(1)
                        .addShape(1)
                        .setContents(InferTensorContents.newBuilder().addBytesContents(ByteString.copyFrom(image))))
                .addOutputs(InferRequestedOutputTensor.newBuilder()
                        .setName("logits")
                        .putParameters("classification", classes))
                .build());
        List<String> found = new ArrayList<>();
        ByteBuffer raw = little(answer);
        while (raw.hasRemaining()) { // of each element its length, and its bytes
            int size = raw.getInt();
            ByteString text = answer.substring(raw.position(), raw.position() + size);
            raw.position(raw.position() + size);
            String[] parts = text.toStringUtf8().split(":", 3);
            found.add(parts[2] + " (" + parts[1] + ") " + parts[0]);
        }
        return found;
    }

    /** The first output that answers a request; the server drops what is later than the deadline. */
    private ByteString ask(ModelInferRequest request) {
        return stub.withDeadlineAfter(TIMEOUT_SECONDS, TimeUnit.SECONDS).modelInfer(request).getRawOutputContents(0);
    }

    private static ByteBuffer little(ByteString bytes) {
        return bytes.asReadOnlyByteBuffer().order(ByteOrder.LITTLE_ENDIAN);
    }
}
